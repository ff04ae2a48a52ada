"""The sizes and dtypes of the tensors of every op, in one table; `arguments.check` reads it.

A line of the table is `name dims dtype [& partner]`; `name?` may be None, and is so with its
partner; `name!` is changed in place when gradients are off. Letters are sizes that all arguments of
a call agree on: `2*D`, `H*D` and `D*D` are products, `1|M` is 1 or M, a number is itself, `...` any
number of dimensions.

Dtypes, where "float" is float16, bfloat16, float32 or float64:

    float   any of these; the first of a call is its main input
    same    that of the main input; under autocast any but float64, which only goes with itself
    gain    as `same`, or float32
    other   float, whatever the others are
    mask    float or bool
    wide    float32 or float64
    bool, int32
"""

from __future__ import annotations

_MULTIPLICATION = """
    z!                 B N N C        float
    mask?              B N N          mask
    w.norm_in_weight   C              gain
    w.norm_in_bias     C              gain
    w.p_in             2*D C          same
    w.g_in             2*D C          same
    w.norm_out_weight  D              gain
    w.norm_out_bias    D              gain
    w.p_out            C D            same
    w.g_out            C C            same
"""
_ATTENTION = """
    z!                 B N N C        float
    mask?              B N N          mask
    w.norm_weight      C              gain
    w.norm_bias        C              gain
    w.bias             H C            same
    w.q                H*D C          same
    w.k                H*D C          same
    w.v                H*D C          same
    w.g                H*D C          same
    w.o                C H*D          same
"""
_AVERAGING = """
    m!                 B S N C        float
    z                  B N N Z        same
    mask?              B N N          mask
    w.norm_m_weight    C              gain
    w.norm_m_bias      C              gain
    w.norm_z_weight    Z              gain
    w.norm_z_bias      Z              gain
    w.m                H*D C          same
    w.g                H*D C          same
    w.z                H Z            same
    w.o                C H*D          same
"""
_VALUES = """
    x                  ROWS C         float
    weight             K C            same
    values             V K            wide
    bias?              K              same
    other?             ROWS C         same
    weight_other?      K C            same
    same?              ROWS           bool     & weight_other
"""
_ATTEND = """
    q                  G F H I D      float
    k                  G F H K D      same
    v                  G F H K D      same
    bias?              1|G 1 H 1|I K  other
    keep?              G F K          bool
"""
_TRANSITION = """
    x                  ... C          float
    w.norm_weight      C              gain
    w.norm_bias        C              gain
    w.fc1              E C            same
    w.fc2              E C            same
    w.fc3              C E            same
"""
_ROWS = """
    x                  B I J C        float
    gain?              C              gain
    shift?             C              gain     & gain
    weight             O C            same
"""
TABLE = {
    "triangle_multiplication": _MULTIPLICATION,
    "triangle_multiplication tile": _MULTIPLICATION.replace("B N N", "B R T"),
    "triangle_attention": _ATTENTION,
    "triangle_attention tile": _ATTENTION.replace("B N N", "B R T"),
    "pair_weighted_averaging": _AVERAGING,
    "pair_weighted_averaging tile": _AVERAGING.replace("B N N", "B R T"),
    "expected_values 3": _VALUES.replace("ROWS", "R T"),
    "expected_values 4": _VALUES.replace("ROWS", "B R T"),
    "expectations": """
    logits             ... K          float
    values             V K            wide
""",
    "attention 4": _ATTEND.replace(" F", "").replace(" 1 H", " H"),
    "attention 5": _ATTEND,
    "attention_pair_bias": """
    q                  M S H D        float
    k                  M S H D        same
    v                  M S H D        same
    bias               1|M H R T      other
""",
    "single_track": """
    s                             M S C   float
    w.attention.norm_weight       C       gain
    w.attention.norm_bias         C       gain
    w.attention.pair_norm_weight  Z       other
    w.attention.pair_norm_bias    Z       other
    w.attention.pair              H Z     other
    w.attention.q                 H*D C   same
    w.attention.k                 H*D C   same
    w.attention.v                 H*D C   same
    w.attention.g                 H*D C   same
    w.attention.o                 C H*D   same
    w.attention.q_bias?           H*D     same
    w.attention.k_bias?           H*D     same
    w.attention.v_bias?           H*D     same
    w.attention.g_bias?           H*D     same
    w.attention.o_bias?           C       same
    w.post_norm_weight?           C       gain    & w.post_norm_bias
    w.post_norm_bias?             C       gain
""",
    "transition": _TRANSITION.replace(" x ", " x!"),
    "swiglu": _TRANSITION.replace("C E ", "O E "),
    "outer_product_mean": """
    z!                 B R T C        float
    a                  B S R D        same
    b                  B S T D        same
    count              B R T          wide
    weight             C D*D          same
    bias               C              same
""",
    "outer_product_mean tile": """
    z!                 B R T C        float
    a                  B S N D        same
    b                  B S N D        same
    mask               B S N          mask
    weight             C D*D          same
    bias               C              same
""",
    "norm_linear": _ROWS,
    "norm_linear_planes": _ROWS
    + """
    bias?              O              same
    out?!              B O I J        other
""",
    "gated_output": """
    x!                 B I J C        float
    gain               C              gain
    shift              C              gain
    gate               W C            same
    o                  B I J W        other
    weight             C W            same
""",
    "adaptive_norm": """
    a                  M S C          float
    scale              1|M S C        other
    shift              1|M S C        other
""",
    "gated_residual": """
    a                  M S C          float
    gate               1|M S C        other
    x                  M S C          other
""",
    "relative_position": """
    table                     K C     float
    positions.rows.chain      R       int32
    positions.rows.residue    R       int32
    positions.rows.token      R       int32
    positions.rows.period?    R       wide
    positions.cols.chain      T       int32
    positions.cols.residue    T       int32
    positions.cols.token      T       int32
    positions.cols.period?    T       wide
    positions.classes         L 3     int32
    out?!                     ROWS C  other
""",
}
TABLE["relative_position 4"] = TABLE["relative_position"].replace("ROWS", "B R T")
TABLE["relative_position"] = TABLE["relative_position"].replace("ROWS", "R T")
