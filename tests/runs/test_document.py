"""What is wrong in an input is said in the user's words, with its line; what Boltz reads passes."""

from __future__ import annotations

import copy
import os
import random
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boltz.main
import gemmi
import numpy as np
import pytest
import yaml
from alone import prediction
from boltz.data.mol import load_canonicals
from boltz_inputs import PROTEIN, write_template

from foldcp.boltz.document.schema import check
from foldcp.boltz.document.setting import Setting

HEAD = "sequences:\n"
A = "- protein: {id: A, sequence: MKTAYIAKQR, msa: empty}\n"
B = "- ligand: {id: B, smiles: CCO}\n"
AB = HEAD + A + B
POCKET = AB + "constraints:\n- pocket: {binder: B, contacts: %s}\n"
CONTACT = AB + "constraints:\n- contact: {token1: %s, token2: [B, C8]}\n"
BOND = AB + "constraints:\n- bond: {atom1: %s, atom2: [B, 1, C8]}\n"
AFFINITY = "properties:\n- affinity: {binder: %s}\n"

LAUGH = "a: &a [x]\n" + "".join(
    f"{after}: &{after} [{9 * f'*{before},'}]\n"
    for before, after in zip("abcdefg", "bcdefgh", strict=True)
)

# Document -> parts of what is said. Lines count from 1.
FAULTY: list[tuple[str | bytes, str]] = [
    ("", "it is empty"),
    ("- a\n", "it must have `sequences:`, got a list"),
    ("text", "it must have `sequences:`, got 'text'"),
    (b"sequences:\n\xff\xfe", "line 2: it is not text in UTF-8"),
    ("a: \x01b", "line 1: it holds a control character"),
    ("sequences:\n-\tprotein: 1\n", "line 2: a tab stands where YAML expects text"),
    ("sequences:\n- protein: [oops\n", "line 2: it is no valid YAML: .*is not closed"),
    ("sequences:\n- protein: {id: 'A}\n\n\n", "line 2: .* a quotation mark is not closed"),
    ("a: b: c\n", "line 1: it is no valid YAML: `:`"),
    (AB + "---\na: 1\n", "it holds several documents"),
    (HEAD + "- ligand: {id: B, smiles: C[C@H](N)O}\n", "line 2: .*put a SMILES in single quotes"),
    ("a: " + "[" * 1500, "it is nested too deeply"),
    ("a: 1\nb: 2024-13-45", "line 2: 2024-13-45 cannot be read as a date"),
    ("a: 1\nb: " + 5000 * "9", "line 2: 9{40}... cannot be read as a number"),
    ("a: !!bool A", "line 1: A cannot be read as true or false"),
    ("a: !!map A", "line 1: a value of this tag .* cannot be read"),
    ("? [a]\n: 1\n", "line 1: .* a key must be text"),
    ("a: &a 1\nb: &a 1", "line 2: .* an anchor .* is given twice"),
    (LAUGH + HEAD + "- ligand: {id: A, ccd: *h}\n", "aliases .* stand for more than 1,000,000"),
    (">A|protein|empty\nMKT\n", "it looks like FASTA: let its name end in .fasta"),
    ("version: 1\n", "it has no `sequences`"),
    ("sequence:\n" + A, "line 1: the input has no field `sequence`: did you mean `sequences`"),
    (HEAD, "line 1: `sequences:` is empty"),
    ("sequences: []\n", "line 1: `sequences` holds no chain"),
    ("sequences:\n  protein: {id: A}\n", "line 1: `sequences` must be a list, got a mapping"),
    (AB + "version: 2\n", "line 4: `version` must be 1, got the number 2"),
    (AB + "version: '1'\n", "line 4: `version` must be 1, got '1'"),
    (AB + "version: 1\nversion: 1\n", "line 5: `version` of the input is given twice"),
    (HEAD + "-protein: {id: A}\n", "line 2: `-protein` begins no entry: it takes `-` and a sp"),
    (HEAD + "-\u00a0protein: {id: A}\n", "line 2: .* begins no entry"),
    (HEAD + "- protein:\n    id:A\n", "line 2: .*put a space after each colon"),
    (HEAD + "- yes: {id: A}\n", "line 2: `true` cannot begin"),
    (HEAD + "- A\n", "line 2: an entry of `sequences` must be protein, dna, rna or ligand"),
    (HEAD + "- protien: {id: A}\n", "line 2: `protien` .*did you mean `protein`"),
    (HEAD + "- Protein: {id: A}\n", "line 2: `Protein` .*did you mean `protein`"),
    (HEAD + "- peptide: {id: A}\n", "line 2: .*it must be protein, dna, rna or ligand"),
    (HEAD + "- protein:\n  id: A\n", "line 2: `protein` must have fields, .*indent its fields"),
    (HEAD + "- protein: MKT\n", "line 2: `protein` must have fields, got 'MKT'"),
    (HEAD + A[:-1] + "\n  ligand: {id: B, ccd: MG}\n", "line 3: `ligand` stands in the entry of"),
    (HEAD + "- protein: {sequence: MKT, msa: empty}\n", "line 2: protein has no `id`"),
    (HEAD + "- protein: {id: A, msa: empty}\n", "line 2: protein A has no `sequence`"),
    (HEAD + "- protein: {id: A, seqence: MKT, msa: empty}\n", "did you mean `sequence`"),
    (AB.replace("id: A", "id: 1"), "line 2: `id` of protein must be text, got the number 1"),
    (AB.replace("id: A", "id: NO"), "`id` of protein must be text, got NO, which YAML reads as f"),
    (AB.replace("id: A", "id: [A, 2]"), "line 2: `id` of protein must be text, got the number 2"),
    (AB.replace("id: A", "id: []"), "line 2: `id` of protein is an empty list"),
    (AB.replace("id: A", "id: ''"), "line 2: `id` of protein is empty"),
    (AB.replace("id: A", "id:"), "line 2: `id` of protein must be text, got nothing"),
    (AB.replace("id: A", "id: {A: 1}"), "line 2: `id` of protein must be text, got a mapping"),
    (AB.replace("id: A", "id: !!omap [A: 1]"), "must be text, got a value with the tag !!omap"),
    (AB.replace("id: A", "id: !!set {A}"), "must be text, got a value with the tag !!set"),
    (AB.replace("id: A", "id: &a [*a]"), "line 2: `id` of protein must be text, got a list"),
    (AB.replace("id: A", r'id: "A\ud800"'), r"line 2: chain id A\\ud800 holds a character that"),
    (AB.replace("id: A", r'id: "A\0"'), r"line 2: chain id A\\u0000 holds a character that"),
    (AB.replace("id: A", "id: ABCDEF"), "line 2: chain id ABCDEF is longer than 5 letters"),
    (AB.replace("id: B", "id: A"), "line 3: chain id A is given twice, first on line 2"),
    (AB.replace("MKTAYIAKQR", "123"), "`sequence` of protein A must be text, got the number 123"),
    (AB.replace("MKTAYIAKQR", "''"), "line 2: `sequence` of protein A is empty"),
    (AB.replace("MKTAYIAKQR", "mkt"), "'m' at position 1 .*write it in capitals"),
    (AB.replace("MKTAYIAKQR", "MK-T"), "'-' at position 3 of the sequence of protein A"),
    (HEAD + "- protein:\n    id: A\n    msa: empty\n    sequence: >-\n      MKT\n      AAA\n",
     "line 5: a space at position 4 .*write the sequence without spaces"),
    (AB.replace("MKTAYIAKQR", "\u041cKT"), r"'\u041c' \(U\+041C\) at position 1"),
    (HEAD + "- rna: {id: R, sequence: GAT}\n", "'T' at position 3 .*write U, or make it `dna`"),
    (HEAD + "- dna: {id: R, sequence: GAU}\n", "'U' at position 3 .*write T, or make it `rna`"),
    (HEAD + "- dna: {id: R, sequence: MKLE}\n", "'L' at position 3 .* stands for no nucleotide"),
    (AB.replace("empty", "[a.a3m]"), "line 2: `msa` of protein A must be a path or `empty`"),
    (AB.replace("empty", "5"), "line 2: `msa` of protein A must be a path or `empty`, got the n"),
    (AB.replace("empty", "Empty"), "line 2: MSA file Empty of protein A not found: write `empty`"),
    (AB.replace("empty", r'"\ud83d.a3m"'), r"MSA file \\ud83d.a3m of protein A not found"),
    (AB.replace("empty", 300 * "a"), "line 2: MSA file a{200}... of protein A not found .File na"),
    (AB.replace("empty", "folder/pipe"), "it is a pipe, not a regular file"),
    (AB.replace("empty", "no.a3m"), "MSA file no.a3m of protein A not found: correct its path"),
    (AB.replace(", msa: empty", ""), "line 2: a protein has no `msa`: .*--use_msa_server"),
    (AB.replace("empty", "folder/x.sto"), "reformat.pl sto a3m x.sto x.a3m"),
    (AB.replace("empty", "folder/x.txt"), "not supported, only a3m or csv"),
    (AB.replace("}", ", modifications: }", 1), "line 2: `modifications:` is empty"),
    (AB.replace("}", ", modifications: [{position: 11, ccd: ALA}]}", 1), "1 to 10"),
    (AB.replace("}", ", modifications: [{position: 0, ccd: ALA}]}", 1), "`position` 0 of"),
    (AB.replace("}", ", modifications: [{position: 1.0, ccd: ALA}]}", 1), "a whole number, got"),
    (AB.replace("}", ", modifications: [{position: 010, ccd: ALA}]}", 1), "010 is 8 to YAML"),
    (AB.replace("}", ", modifications: [" + 2 * "{position: 1, ccd: ALA}, " + "]}", 1),
     "changes position 1 again: keep one"),
    (AB.replace("}", ", modifications: [{position: 1, ccd: sep}]}", 1), "no sep in Boltz's dict"),
    (AB.replace("}", ", modifications: [ALA]}", 1), "must be `{position: 2, ccd: SEP}`, got"),
    (AB.replace("}", ", modifications: [{positon: 1, ccd: ALA}]}", 1), "did you mean `position`"),
    (AB.replace("}", ", cyclic: 'no'}", 1), "`cyclic` of protein A must be true or false"),
    (AB.replace("}", ", cyclic: [1]}", 1), "must be true or false, got a list"),
    (HEAD + "- ligand: {id: B}\n", "line 2: ligand B has neither `ccd` nor `smiles`"),
    (HEAD + "- ligand: {id: B, ccd: MG, smiles: C}\n", "line 2: ligand B has both"),
    (HEAD + "- ligand: {id: B, ccd: OFF}\n", "there is no OFF in Boltz's dictionary"),
    (HEAD + "- ligand: {id: B, ccd: ~}\n", "must be a code such as ATP, got nothing"),
    (HEAD + "- ligand: {id: B, ccd: {A: 1}}\n", "must be a code such as ATP, got a mapping"),
    (HEAD + "- ligand: {id: B, ccd: mg}\n", "there is no mg in Boltz's .*did you mean MG"),
    (HEAD + "- ligand: {id: B, ccd: CC(=O)O}\n", "a SMILES goes into `smiles`"),
    (HEAD + "- ligand: {id: B, ccd: []}\n", "`ccd` of ligand B is an empty list"),
    (HEAD + "- ligand: {id: B, smiles: [Na+]}\n", "is read as a list by YAML: put it in quotes"),
    (HEAD + "- ligand: {id: B, smiles: NO}\n", "must be text, got NO, which YAML reads as false"),
    (HEAD + "- ligand: {id: B, smiles: 'C(C'}\n", r"C\(C, is no SMILES: \(\) do not pair up"),
    (HEAD + "- ligand: {id: B, smiles: 'CC(C)(C)(C)C'}\n", "no possible molecule .Explicit vale"),
    (HEAD + "- ligand: {id: B, smiles: C, cyclic: true}\n", "ligand B cannot be cyclic"),
    (AB.replace("CCO", "'C1[C@@]23[C@]1(CC2)CC3'"), r"no three-.* form of .*\(C1\[C@@\]23"),
    (AB.replace("CCO", 400 * "C"), r"more atoms of one element than .*\(C{40}\.\.\.\)"),
    (AB + "a: !!python/object:os.x 1\n", "line 4: a tag .* put the value in quotes"),
    (AB.replace("id: A", "id: ="), "line 2: a tag .* or a bare `=` or `<<`"),
    (AB + "constraints:\n", "line 4: `constraints:` is empty"),
    (AB + "constraint: []\n", "line 4: the input has no field `constraint`: did you mean"),
    (AB + "constraints:\n  bond: {}\n", "line 4: `constraints` must be a list, got a mapping"),
    (AB + "constraints:\n- bnd: {}\n", "line 5: `bnd` .*did you mean `bond`"),
    (BOND % "[A, 1, CX]", r"residue 1 of chain A \(MET\) has no atom CX"),
    (BOND % "[A, 11, CA]", "`atom1` of the bond is residue 11 of chain A, which has 1 to 10"),
    (BOND % "[Z, 1, CA]", "is chain Z, which the input does not have"),
    (BOND % "[A, 1]", r"must be \[chain, residue number, atom name\]"),
    (BOND % "[A, CA, 1]", "the second of `atom1` of the bond must be a residue number"),
    (BOND % "[B, 1, C4]", "a constraint names atom C4 of residue 1 of chain B"),
    (AB + "constraints:\n- bond: {atom1: [A, 1, CA]}\n", "the bond has no `atom2`"),
    (POCKET % "[A, 2]", r"a list of pairs, .*write \[\[A, 2\]\]"),
    (POCKET % "[[A, 99]]", "residue 99 of chain A, which has 1 to 10"),
    (POCKET % "[[A, CA]]", "with protein A is by residue number, got 'CA'"),
    (POCKET % "[[B, 1]]", "with ligand B is by atom name, got the number 1"),
    (POCKET % "", "`contacts` of the pocket must be a list of pairs, .*, got nothing"),
    ((POCKET % "[[A, 1]]").replace("binder: B", "binder: C"), "chain C, which the input does not"),
    ((POCKET % "[[A, 1]]").replace("binder: B", "binder: [B]"), "must be a chain's id, got a l"),
    (POCKET % "[[A, 1]], max_distance: far", "a number of angstroms above 0, got 'far'"),
    (POCKET % "[[A, 1]], max_distance: '6'", "above 0, got '6' in quotes"),
    (POCKET % ("[[A, 1]], max_distance: 1" + 400 * "0"), "above 0, got the number 10{39}"),
    (POCKET % "[[A, 1:30]]", "1:30 is 90 to YAML: write it without `:`"),
    (CONTACT % "[A]", r"`token1` of the contact must be \[chain, residue number\]"),
    (AB + "templates:\n", "line 4: `templates:` is empty"),
    (AB + "templates:\n- {chain_id: A}\n", "line 5: a template has neither `cif` nor `pdb`"),
    (AB + "templates:\n- {cif: no.cif}\n", "line 5: template no.cif not found"),
    (AB + "templates:\n- no.cif\n", "line 5: a template must be `cif:` or `pdb:` and a path"),
    (AB + "templates:\n- {pdb: t.pdb, chain_id: B}\n", "is B, which is no protein of the input"),
    (AB + "templates:\n- {pdb: t.pdb, force: true}\n", "`force` needs `threshold`"),
    (AB + "templates:\n- {pdb: folder/noseq.pdb}\n", "it lacks SEQRES records"),
    (AB + "templates:\n- {cif: folder/empty.cif}\n", "it has no model"),
    (AB + "templates:\n- {cif: folder/bare.cif}\n", "it lacks the categories entity"),
    (AB + "templates:\n- {cif: folder/x.txt}\n", "it is not a mmCIF file"),
    (AB + "templates:\n- {cif: t.pdb}\n", "it is a PDB file: write `pdb:` before its path"),
    (AB + "templates:\n- {cif: folder/pipe}\n", "line 5: template folder/pipe is a pipe"),
    (AB + "templates:\n- {pdb: folder/x.txt}\n", "it is not a PDB file"),
    (AB + "templates:\n- {pdb: t.pdb, template_id: Q}\n", "template t has no protein chain Q"),
    (AB + "properties:\n", "line 4: `properties:` is empty"),
    (AB + "properties:\n  affinity: {binder: B}\n", "line 4: `properties` must be a list, got a m"),
    (AB + "properties:\n- afinity: {binder: B}\n", "line 5: `afinity` .*did you mean `affinity`"),
    (AB + AFFINITY % "A", "line 5: `binder` of the affinity is protein A, but must be a ligand"),
    (AB + AFFINITY % "C", "is chain C, which the input does not have"),
    (AB.replace("id: B", "id: [B, C]") + AFFINITY % "B", "is one of 2 copies of its ligand"),
    (AB.replace("CCO", "'CC(=O)[O-].[Na+]'") + AFFINITY % "B", "several molecules, such as a salt"),
    (AB.replace("CCO", "'C[Pt]C'") + AFFINITY % "B", "is a salt, a metal or a mixture"),
    (AB + "- ligand: {id: C, ccd: MG}\n" + AFFINITY % "B" + "- affinity: {binder: C}\n",
     "Boltz predicts the affinity of one ligand, got B and C"),
]  # fmt: skip
FASTA = [
    ("", "it holds no chain"),
    ("\ufeff>A|rna\nGG\n", "line 1: it begins with a byte order mark"),
    (">A|protein|empty\nMK\u2028T\n", r"line 2: '\\u2028' at position 3 .*without spaces"),
    (">A|protein\nMKT\n", "line 1: a protein has no MSA: .*`>A|protein|empty`"),
    (">A protein\nMKT\n", "line 1: header `>A protein` has no `|`"),
    (">A|protien|empty\nMKT\n", "line 1: .*did you mean protein"),
    (">A|prot|empty\nMKT\n", "line 1: `prot` in header .* is no kind of chain"),
    (">A|rna|x.a3m\nGG\n", "line 1: header .* names an MSA, which only proteins have"),
    (">|rna\nGG\n", "line 1: `id` of rna is empty"),
    (">A|protein|empty\nMKT\n>B|smiles\nC(C\n", "line 4: `smiles` of ligand B"),
]
# Never in what a user is told.
NEVER = re.compile(
    r"\(\)\.?$|Traceback|object|NoneType|KeyError|TypeError|IndexError|AttributeError|"
    r"AssertionError|C\+\+|Boost|<class|unpack|parser cannot read"
)


@pytest.fixture(scope="module")
def process(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Read a document as a prediction does: what is said about it, "" if it is read."""
    from foldcp.boltz.inputs import one_input, processing

    names = ("process_input", "process_inputs", "run_mmseqs2", "parse_a3m", "parse_csv")
    kept = {name: getattr(boltz.main, name) for name in (*names, "parse_yaml", "parse_fasta")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in kept.items():
            patch.setattr(boltz.main, name, value)
        patch.setattr(traceback, "print_exc", lambda: None)  # to the log of a run
        patch.chdir(tmp_path_factory.mktemp("documents"))
        _write_files(Path())
        processing.install(boltz.main)
        canonicals = load_canonicals(tiny_cache / "mols")
        out = Path("out")
        folders = one_input.PLACES
        for name in folders.values():
            (out / name).mkdir(parents=True, exist_ok=True)

        def read(
            text: str | bytes, suffix: str = ".yaml", boltz2: bool = True, mols: Path | None = None
        ) -> str:
            path = Path(f"x{suffix}")
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            with prediction() as run:
                run.reasons = out
                (out / path.name).unlink(missing_ok=True)
                boltz.main.process_input(
                    path, ccd=canonicals, mol_dir=mols or tiny_cache / "mols", boltz2=boltz2,
                    use_msa_server=False, msa_server_url="", msa_pairing_strategy="",
                    msa_server_username=None, msa_server_password=None, api_key_header=None,
                    api_key_value=None, max_msa_seqs=9,
                    **{option: out / name for option, name in folders.items()},
                )  # fmt: skip
                reason = out / path.name
                return reason.read_text() if reason.exists() else ""

        yield read


def _write_files(folder: Path) -> None:
    write_template(folder / "t.pdb", PROTEIN[:10])
    (folder / "folder").mkdir()
    os.mkfifo(folder / "folder" / "pipe")
    text = (folder / "t.pdb").read_text()
    (folder / "folder" / "noseq.pdb").write_text(text[text.index("ATOM") :])
    parts = gemmi.MmcifOutputGroups(False)
    parts.atoms = parts.group_pdb = True
    block = gemmi.read_structure(str(folder / "t.pdb")).make_mmcif_block(parts)
    (folder / "folder" / "bare.cif").write_text(block.as_string())
    (folder / "folder" / "empty.cif").write_text("data_x\n_entry.id x\n")
    (folder / "folder" / "x.txt").write_text("hello\n")
    (folder / "folder" / "x.sto").write_text("# STOCKHOLM 1.0\n")


@pytest.mark.parametrize("index", range(len(FAULTY)))
def test_a_faulty_document_is_explained(
    index: int, process: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    text, said = FAULTY[index]
    reason = process(text)
    assert re.search(said, reason), reason
    assert not NEVER.search(reason), reason
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    assert shown.out.count("foldcp: x.yaml is left out: ") == 1 and "Failed" not in shown.out


@pytest.mark.parametrize(("text", "said"), FASTA)
def test_a_faulty_fasta_is_explained(text: str, said: str, process: Any) -> None:
    reason = process(text, ".fasta")
    assert re.search(said, reason) and not NEVER.search(reason), reason


def test_codes_are_read_as_they_are_written(process: Any, tiny_cache: Path, tmp_path: Path) -> None:
    """YAML makes numbers, dates and truth values of some."""
    mols, codes = tmp_path / "mols", ["143", "017", "NO", "0x1", "1_0", "1.0", "6:30", "on", "1E2"]
    mols.mkdir()
    for path in (tiny_cache / "mols").iterdir():
        (mols / path.name).symlink_to(path)
    for code in codes:
        (mols / f"{code}.pkl").symlink_to(tiny_cache / "mols" / "MG.pkl")
    ligands = [f"- ligand: {{id: {'LMNOPQRST'[i]}, ccd: {code}}}" for i, code in enumerate(codes)]
    several = f"- ligand: {{id: U, ccd: [{', '.join(codes)}]}}"
    shared = "- ligand:\n    <<: &b {ccd: 143}\n    id: V\n- ligand: {<<: *b, id: W}\n"
    anchored = "{position: &p 1, ccd: *p}, {position: 2, ccd: ALA}"  # number here, code there
    changed = f"- protein: {{id: A, sequence: MK, msa: empty, modifications: [{anchored}]}}"
    (mols / "1.pkl").symlink_to(tiny_cache / "mols" / "ALA.pkl")
    text = HEAD + "\n".join([changed, *ligands, several, shared])
    assert process(text, mols=mols) == ""
    residues = np.load("out/structures/x.npz")["residues"]["name"].tolist()
    assert sorted(residues) == sorted(["1", "ALA", *codes, *codes, "143", "143"])
    assert process(text.replace("0x1", "0x2"), mols=mols).count("there is no 0x2 in Boltz's") == 2
    assert process("> A|protein|empty x\nMK\n", ".fasta") == ""  # as Boltz's docstring has it
    assert process(">A|ccd\n143\n>B|ccd\n017\n", ".fasta", mols=mols) == ""


BIG = {
    "version": 1,
    "sequences": [
        {"protein": {"id": "A", "sequence": "MKTAYIAKQR", "msa": "empty", "cyclic": False,
                     "modifications": [{"position": 2, "ccd": "ALA"}]}},
        {"rna": {"id": ["R", "S"], "sequence": "GAUC"}},
        {"ligand": {"id": "B", "smiles": "CCO"}},
        {"ligand": {"id": "M", "ccd": "MG"}},
    ],
    "constraints": [
        {"bond": {"atom1": ["A", 1, "CA"], "atom2": ["B", 1, "C8"]}},
        {"pocket": {"binder": "B", "contacts": [["A", 2], ["M", "MG"]], "max_distance": 5,
                    "force": False}},
        {"contact": {"token1": ["A", 3], "token2": ["B", "C8"], "max_distance": 4.5}},
    ],
    "templates": [{"pdb": "t.pdb", "chain_id": "A", "template_id": "A1", "threshold": 2}],
    "properties": [{"affinity": {"binder": "B"}}],
}  # fmt: skip
VALUES = [None, True, False, 0, 1, -1, 2.0, 2.5, "", "A", "B", "x", "CA", "MG", "empty", "GG", [],
          {}, ["A"], ["A", 1], [["A", 1]], ["A", 1, "CA"], {"a": 1}, [None]]  # fmt: skip
# What Boltz reads, though not as it is meant.
STRICTER = re.compile(
    r"is empty|an empty list|holds no chain|stands for no|is given twice|true or false|did you mean"
    r"|angstroms above 0|position` (0|-1) of|has 1 to|stands in the entry|both `cif`|not found"
    r"|has no `msa`|a whole number, got true|the number 2.5|is no protein of|got a mapping"
)


def _mutated(random_: random.Random) -> Any:
    """The document with one value replaced, removed, renamed or repeated."""
    document = copy.deepcopy(BIG)
    at: Any = document
    while True:
        key = random_.choice(list(at) if isinstance(at, dict) else list(range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or random_.random() < 0.2:
            break
        at = at[key]
    what = random_.random()
    if what < 0.7:
        at[key] = copy.deepcopy(random_.choice(VALUES))
    elif what < 0.8:
        del at[key]
    elif isinstance(at, dict):
        at[f"{key}{random_.choice('sx')}" if what < 0.9 else str(key).title()] = at.pop(key)
    else:
        at.append(copy.deepcopy(at[key]))
    return document


def test_what_boltz_reads_passes_and_what_it_does_not_is_explained(
    process: Any, tiny_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against Boltz's own parser, on documents with one thing changed at random."""
    stock = boltz.main.parse_yaml.__wrapped__
    canonicals, random_ = load_canonicals(tiny_cache / "mols"), random.Random(1)
    path, read = Path("m.yaml"), {True: 0, False: 0}
    for _ in range(250):
        document = _mutated(random_)
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        found = check(path, Setting(has_residue=lambda code: code in ("ALA", "MG")))
        if found.found:
            assert not NEVER.search(found.message()), (document, found.message())
            if STRICTER.search(found.message()):
                continue
        try:
            stock(path, canonicals, tiny_cache / "mols", True)
            reads = True
        except Exception:
            reads = False
        read[reads] += 1
        assert not (reads and found.found), (document, found.message())
        if not reads and not found.found:
            reason = process(path.read_bytes())
            assert reason and not NEVER.search(reason), (document, reason)
    assert min(read.values()) > 30, read
