"""Booting an unmodified Linux kernel: the image, what the firmware is given with it, and the machine around both.

Reading order: `bzimage` (the image), `layout` (guest-physical memory), `aml` and `acpi` (the tables), `window` (what
the firmware is handed), `packages` (Debian's kernel and busybox), `cpio` and `initramfs` (what the kernel starts),
`machine` (the machine itself).
"""
