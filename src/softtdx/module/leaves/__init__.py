"""Host-side leaf functions, TDH.*: importing this package registers them all."""

from . import mem_page, mem_range, mem_rw, mem_sept, mr  # noqa: F401
