"""Host-side leaf functions, TDH.*: importing this package registers them all."""

from . import (  # noqa: F401
    mem_page,
    mem_range,
    mem_rw,
    mem_sept,
    mem_size,
    metadata,
    mng,
    mng_init,
    mr,
    phymem,
    phymem_pamt,
    sys,
    sys_config,
    sys_update,
    vp,
)
