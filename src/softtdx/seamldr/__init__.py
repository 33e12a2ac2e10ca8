"""The SEAM loader: verifies and installs the TDX module.

Two stages, as on hardware: `np_seamldr` is the authenticated code module that the boot processor launches by
GETSEC[ENTERACCS]; it checks the platform and installs the `p_seamldr` in SEAMRR, which then serves SEAMLDR.* through
SEAMCALL (RAX bit 63). `image` and `sigstruct` are what is loaded, `release` makes and signs this build's module.
"""

from softtdx.seamldr.np_seamldr import launch_np_seamldr as launch_np_seamldr
from softtdx.seamldr.release import Release as Release
from softtdx.seamldr.release import development_release as development_release
