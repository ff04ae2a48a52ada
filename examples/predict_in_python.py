"""Fold a complex from Python and work with its numbers instead of its files.

    python examples/predict_in_python.py                                # one GPU, or the CPU
    torchrun --nproc-per-node 4 examples/predict_in_python.py           # the same on four GPUs

Look at: `result` is a prediction on rank 0 and None on the others; arrays are sorted by confidence,
the best sample first; `atoms` and `tokens` say which chain and residue each number belongs to.
"""

import argparse

import foldcp

# What would stand in a YAML file: two insulin chains, folded from their sequences alone.
INSULIN = {
    "version": 1,
    "sequences": [
        {"protein": {"id": "A", "sequence": "GIVEQCCTSICSLYQLENYCN", "msa": "empty"}},
        {"protein": {"id": "B", "sequence": "FVNQHLCGSHLVEALYLVCGERGFFYTPKT", "msa": "empty"}},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sampling-steps", type=int, default=200)
    parser.add_argument("--save", metavar="FILE", help="write the best structure there (mmCIF)")
    options = parser.parse_args()

    model = foldcp.load("boltz2")
    result = model.predict(
        INSULIN, name="insulin", seed=1, diffusion_samples=2, sampling_steps=options.sampling_steps
    )
    if result is None:  # the others have done their part
        return
    print(f"{result.name}: {len(result.tokens)} tokens, {len(result.atoms)} atoms")
    for chain in ("A", "B"):
        mean = result.plddt[0][result.tokens["chain"] == chain].mean()
        print(f"chain {chain}: mean pLDDT {mean:.3f}")
    between = result.pae[0][result.tokens["chain"] == "A"][:, result.tokens["chain"] == "B"]
    print(f"PAE from chain A to chain B: mean {between.mean():.1f} angstroms")
    print(f"ipTM of all samples: {result.scores['iptm'].round(3).tolist()}")
    ca = result.coords[0][result.atoms["name"] == "CA"]  # [residues, 3], angstroms
    print(f"{len(ca)} CA atoms, the first at {ca[0].tolist()}")
    if options.save:
        result.save(options.save)


if __name__ == "__main__":
    main()
