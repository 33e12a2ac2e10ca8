"""`python -m softtdx.seamldr`: the build step that makes the development key, the module image and its signature."""

import argparse

from softtdx.abi.structs import SeamSigstruct
from softtdx.seamldr.release import development_release

parser = argparse.ArgumentParser(prog="python -m softtdx.seamldr", description="Build and sign the TDX module image.")
parser.add_argument("--quiet", action="store_true", help="print nothing")
arguments = parser.parse_args()
release = development_release()
if not arguments.quiet:
    print(f"module image: {len(release.image)} bytes, MRSEAM {SeamSigstruct(release.sigstruct).seamhash.hex()}")
