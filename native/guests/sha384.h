/* SHA-384 (FIPS 180-4), for measurements. */
#ifndef SOFTTDX_SHA384_H
#define SOFTTDX_SHA384_H

#include <stddef.h>
#include <stdint.h>

void sha384(const void *message, size_t size, uint8_t digest[48]);

#endif
