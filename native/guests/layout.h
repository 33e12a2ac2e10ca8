/* Numbers that the launcher's assembly and C share; launcher.c checks them against boot_info.h. */
#ifndef SOFTTDX_LAYOUT_H
#define SOFTTDX_LAYOUT_H

#define SELECTOR_CODE 0x10
#define SELECTOR_DATA 0x18
#define SELECTOR_TSS 0x20

#ifndef PORT_PARK
#define PORT_PARK 0x510
#define PORT_EXIT 0x501
#endif

#define PERCPU_SHIFT 14
#define BOOT_INFO_PERCPU_BASE 32
#define BOOT_INFO_AP_INDEX 96

#define BOOT_STACK_SIZE 2048
#define SHARED_WINDOW_SLOT 128 /* of the PML4: virtual addresses from 64 TiB on */

#endif
