/* heap.h: what the socket layer needs of the VMMC heap: receives into it can be redirected. */
#ifndef VMMC_HEAP_H
#define VMMC_HEAP_H

#include <stdbool.h>
#include <stdint.h>

struct endpoint;

/* Whether an address lies where vmmc_alloc's memory does. */
bool heap_contains(const struct endpoint *endpoint, const void *address);

/* When [address, + length) is memory that vmmc_alloc handed out for this endpoint, pins it, tells its
 * offset in the heap and returns true; heap_release must follow.  False: it is not, or cannot be pinned
 * now.  Costs two compares for an address outside the heap. */
bool heap_hold(struct endpoint *endpoint, const void *address, uint64_t length, uint64_t *offset);
void heap_release(struct endpoint *endpoint, uint64_t offset, uint64_t length);

#endif
