/* real.c: finds the C library's functions.  See real.h. */
#include "real.h"

#include <dlfcn.h>

struct real_calls real_calls;
_Atomic bool real_known;

/* Two threads that come here together find the same addresses, so that no lock is needed. */
void real_resolve(void) {
#define REAL_LOOK_UP(name) real_calls.name = (__typeof__(&name))dlsym(RTLD_NEXT, #name);
  REAL_CALLS(REAL_LOOK_UP)
  atomic_store_explicit(&real_known, true, memory_order_release); /* after the table that it speaks of */
}
