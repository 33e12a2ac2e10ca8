"""Guest-side leaf functions, TDG.*: importing this package registers them all."""

from . import mem, metadata, mr, vp  # noqa: F401
