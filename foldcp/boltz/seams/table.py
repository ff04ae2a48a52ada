"""The seams: each name of Boltz that foldcp replaces or relies on, by which file, and why.

A body is written `module:name` below `boltz`. What counts is the bodies: where one differs from
those that foldcp knows, foldcp does not run. Names without a body (modules such as `tqdm`) are
looked up by a body that is listed.
"""

from __future__ import annotations

from dataclasses import dataclass

from foldcp.boltz.seams.models import IMITATED

REPLACES, WRAPS, REBINDS, IMITATES = "replaces", "wraps", "rebinds", "imitates"
READS = "reads"


@dataclass(frozen=True)
class Seam:
    """One thing that foldcp does with stock's code.

    Args:
        names: as foldcp's code writes them.
        how: replaces, wraps (stock's runs inside ours), rebinds (stock's code runs with other
            globals), imitates (ours does the same otherwise; stock's does not run) or reads.
        ours: the file below `foldcp/` that does so.
        why: the reason.
        bodies: of stock, on which this relies.
    """

    names: tuple[str, ...]
    how: str
    ours: str
    why: str
    bodies: tuple[str, ...] = ()


def _seam(names: str, how: str, ours: str, why: str, bodies: str = "") -> Seam:
    return Seam(tuple(names.split()), how, ours, why, tuple(bodies.split()))


COMMAND = (
    _seam("main.cli.main", WRAPS, "boltz/command/guarded.py",
          "meet the other ranks, and turn every error into one message on all of them",
          "main:cli"),
    _seam("main.predict.callback", WRAPS, "boltz/switch.py",
          "check the run, form the mesh, run stock's command, sum up failures",
          "main:predict main:check_inputs main:get_cache_path main:BoltzProcessedInput"),
    _seam("main.download_boltz1 main.download_boltz2", WRAPS, "boltz/inputs/download.py",
          "one run downloads, others wait; only complete files get their names",
          "main:download_boltz1 main:download_boltz2"),
    _seam("main.process_inputs", WRAPS, "boltz/inputs/processing.py",
          "rank 0 reads; an input that fails does not stop the others",
          "main:process_inputs data.mol:load_canonicals"),
    _seam("main.process_input", REBINDS, "boltz/inputs/one_input.py",
          "write what an input becomes to a folder of its own, and move it when it is complete; "
          "`print`, which stock calls only where reading failed, raises that failure again",
          "main:process_input main:compute_msa"),
    _seam("main.run_mmseqs2", WRAPS, "boltz/inputs/answers.py",
          "keep each complete answer of the MSA server for a later run, and check it before it is "
          "used", "data.msa.mmseqs2:run_mmseqs2"),
    _seam("main.parse_a3m main.parse_csv", WRAPS, "boltz/inputs/msas.py",
          "say what is wrong with an alignment, and in which file",
          "data.parse.a3m:parse_a3m data.parse.a3m:_parse_a3m data.parse.csv:parse_csv"),
    _seam("main.parse_yaml main.parse_fasta", WRAPS, "boltz/inputs/msas.py",
          "accept packed alignments (`.gz`), and any case of the suffix",
          "data.parse.yaml:parse_yaml data.parse.fasta:parse_fasta"),
    _seam("main.tqdm", REPLACES, "boltz/inputs/processing.py",
          "show progress in the one line of the run"),
    _seam("main.Manifest", WRAPS, "boltz/switch.py",
          "rank 0 reads the manifest, the others get it", "data.types:Manifest"),
    _seam("main.filter_inputs_structure main.filter_inputs_affinity", WRAPS, "boltz/switch.py",
          "rank 0 decides what is still to be done; the affinity pass gets only inputs that ask "
          "for it and have a structure (stock ends with an error otherwise)",
          "main:filter_inputs_structure main:filter_inputs_affinity"),
    _seam("main.Boltz2InferenceDataModule", REPLACES, "boltz/lightning/data.py",
          "rank 0 featurises; all ranks of a mesh get the compact features and the random state",
          "data.module.inferencev2:Boltz2InferenceDataModule "
          "data.module.inferencev2:PredictionDataset data.module.inferencev2:collate"),
    _seam("main.BoltzInferenceDataModule", REPLACES, "boltz/lightning/boltz1_data.py",
          "the same for Boltz-1",
          "data.module.inference:BoltzInferenceDataModule data.module.inference:PredictionDataset "
          "data.module.inference:collate"),
    _seam("main.Boltz2 main.Boltz1", WRAPS, "boltz/lightning/trainer.py",
          "load without drawing weights, then swap the loaded model",
          "model.models.boltz2:Boltz2.__init__ model.models.boltz1:Boltz1.__init__ "
          "model.models.boltz2:Boltz2.on_load_checkpoint "
          "model.models.boltz1:Boltz1.on_load_checkpoint"),
    _seam("main.Trainer", WRAPS, "boltz/lightning/trainer.py",
          "one device per rank; Lightning must not see the launcher's ranks, or it would share the "
          "inputs out"),
    _seam("main.BoltzWriter main.BoltzAffinityWriter", WRAPS, "boltz/lightning/writers.py",
          "rank 0 writes; matrices come from disk; a folder gets its name when it is complete",
          "data.write.writer:BoltzWriter data.write.writer:BoltzAffinityWriter"),
    _seam("main.foldcp_switched", REPLACES, "boltz/switch.py",
          "mark the module, so that it is patched once"),
)  # fmt: skip

ELSEWHERE = (
    _seam("types.NumpySerializable.load", REPLACES, "boltz/inputs/trust.py",
          "load plain arrays from a results folder, never pickles",
          "data.types:NumpySerializable data.types:Structure.load"),
    _seam("types.JSONSerializable.load", WRAPS, "boltz/inputs/trust.py",
          "read regular files inside the results folder, and check that a record is the one asked "
          "for", "data.types:JSONSerializable data.types:Record"),
    _seam("types.JSONSerializable.dump", REPLACES, "boltz/inputs/one_input.py",
          "write JSON completely or not at all"),
    _seam("types.Manifest.load", WRAPS, "boltz/inputs/trust.py", "check the names of all records"),
    _seam("inferencev2.pickle", REPLACES, "boltz/inputs/trust.py",
          "read molecules of a results folder without running code from a pickle"),
    _seam("inferencev2.load_input inference.load_input", WRAPS, "boltz/inputs/trust.py",
          "check every path of a record before it is opened",
          "data.module.inferencev2:load_input data.module.inference:load_input"),
    _seam("module.load_molecules", WRAPS, "boltz/inputs/trust.py",
          "in `mol`, `inferencev2`, `mmcif`, `mmcif_with_constraints`, `schema`: check names of "
          "residues before a path is made of them", "data.mol:load_molecules"),
    _seam("featurizerv2.get_symmetries", WRAPS, "boltz/inputs/trust.py",
          "it loads pickles, which only training needs", "data.mol:get_symmetries"),
    _seam("stock_schema.parse_mmcif stock_schema.parse_pdb", WRAPS, "boltz/inputs/processing.py",
          "accept regular files only, and explain a template that cannot be read",
          "data.parse.mmcif:parse_mmcif data.parse.pdb:parse_pdb"),
    _seam("mmseqs2.tqdm", REPLACES, "boltz/inputs/processing.py",
          "show progress in the one line of the run"),
    _seam("mmseqs2.tarfile", REPLACES, "boltz/inputs/answers.py",
          "unpack regular files only, into their own folder"),
    _seam("stock.yaml", REPLACES, "boltz/document/codes.py",
          "in `boltz.data.parse.yaml`: read CCD codes as written (`NO` is a code, not false)"),
    _seam("parse_boltz_schema", IMITATES, "boltz/document/schema.py",
          "check an input before stock's parser, line by line",
          "data.parse.schema:parse_boltz_schema data.parse.schema:token_spec_to_ids"),
    _seam("trunc_normal_init_", REPLACES, "boltz/families/loading.py",
          "while a checkpoint is loaded: count draws instead of making them",
          "model.layers.initialize:trunc_normal_init_"),
)  # fmt: skip

# Those that foldcp reads, and those that they are made of.
_CONSTANTS = (
    "canonical_tokens", "chain_type_ids", "chain_types", "contact_conditioning_info",
    "dna_letter_to_token", "method_types_ids", "nucleic_backbone_atom_index",
    "nucleic_backbone_atom_names", "num_elements", "num_tokens", "pocket_contact_info",
    "prot_letter_to_token", "protein_backbone_atom_index", "protein_backbone_atom_names",
    "ref_atoms", "rna_letter_to_token", "token_ids", "tokens", "unk_token", "vdw_radii",
)  # fmt: skip
_V2, _V1 = "data.feature.featurizerv2:", "data.feature.featurizer:"
FEATURES = (
    _seam("process_atom_features", REBINDS, "boltz/features/stock.py",
          "no distogram target; `_augment_residues` walks residues, not all atoms for each",
          f"{_V2}process_atom_features {_V1}process_atom_features "
          "model.modules.utils:center_random_augmentation"),
    _seam("process_ensemble_features", WRAPS, "boltz/features/stock.py",
          "called for one conformer, before the atoms", f"{_V2}process_ensemble_features"),
    _seam("construct_paired_msa", REBINDS, "boltz/features/stock.py",
          "rows of an alignment as bytes", f"{_V2}construct_paired_msa {_V1}construct_paired_msa"),
    _seam("process_msa_features prepare_msa_arrays", IMITATES, "boltz/features/stock.py",
          "profiles and deletions without a one-hot of S x N x 33",
          f"{_V2}process_msa_features {_V2}prepare_msa_arrays {_V2}_prepare_msa_arrays_inner "
          f"{_V1}process_msa_features {_V1}prepare_msa_arrays {_V1}_prepare_msa_arrays_inner"),
    _seam("load_dummy_templates_features compute_template_features process_template_features",
          REBINDS, "boltz/features/stock.py", "residue types as indices",
          f"{_V2}load_dummy_templates_features {_V2}compute_template_features "
          f"{_V2}process_template_features"),
    _seam("process_token_features", IMITATES, "boltz/features/boltz2.py",
          "bonds and contacts as lists, not as N x N",
          f"{_V2}process_token_features {_V1}process_token_features"),
    _seam("process_residue_constraint_features process_chain_feature_constraints "
          "process_contact_feature_constraints", WRAPS, "boltz/features/boltz2.py",
          "called in stock's order",
          f"{_V2}process_residue_constraint_features {_V2}process_chain_feature_constraints "
          f"{_V2}process_contact_feature_constraints {_V1}process_residue_constraint_features "
          f"{_V1}process_chain_feature_constraints"),
    _seam("const", READS, "boltz/features/boltz2.py",
          "numbers of tokens, elements, atoms, chain types and methods, which mean what they did "
          "when the weights were trained",
          " ".join(f"data.const:{name}" for name in _CONSTANTS)),
    _seam("Boltz2Featurizer BoltzFeaturizer", REPLACES, "boltz/features/boltz2.py",
          "hand out compact features, in stock's order of draws",
          f"{_V2}Boltz2Featurizer {_V1}BoltzFeaturizer"),
)  # fmt: skip

MODELS = tuple(
    Seam(bodies, IMITATES, ours, why, bodies)
    for ours, why, listed in IMITATED
    for bodies in [tuple(listed.split())]
)

SEAMS = (*COMMAND, *ELSEWHERE, *FEATURES, *MODELS)


def bodies() -> dict[str, tuple[str, ...]]:
    """Return the names of the bodies that count, by file below the folder of `boltz`."""
    found: dict[str, tuple[str, ...]] = {}
    for body in sorted({body for seam in SEAMS for body in seam.bodies}):
        module, _, name = body.partition(":")
        path = f"{module.replace('.', '/')}.py"
        found[path] = (*found.get(path, ()), name)
    return found
