/*
 * utlb.c: the NIC's cache of the user-managed TLB.
 *
 * The library enters translations of the heap pages that it pinned into a table in its own segment;
 * the NIC looks each page up here first and goes to that table on a miss, as the interface card of
 * the paper fetched entries over the I/O bus.  A cached entry is used only while the table still has
 * it: the library may unpin at any time, and an unpinned page must not be touched.
 */
#include "nic.h"

enum { WAYS = 4, SETS = 1024 }; /* 4096 pages, 16 MiB of reach */

struct translation {
  uint32_t serial; /* of the endpoint, 0: empty */
  uint32_t page;
};
static struct translation cache[SETS][WAYS];
static uint8_t next_victim[SETS];

static int translate_page(struct endpoint *e, uint32_t page, uint32_t *hits) {
  const _Atomic uint8_t *table = (const _Atomic uint8_t *)(e->app + VMMC_APP_UTLB);
  /* acquire: the page was committed before the library made the entry valid */
  bool valid = atomic_load_explicit(&table[page], memory_order_acquire) == VMMC_UTLB_VALID;
  uint32_t set = (page ^ e->serial * 2654435761u) % SETS;
  struct translation *way = cache[set];
  for (int i = 0; i < WAYS; i++) {
    if (way[i].serial != e->serial || way[i].page != page) continue;
    if (!valid) {
      way[i].serial = 0;
      break;
    }
    ++*hits;
    return 0;
  }
  COUNT(e, utlb_misses, 1);
  if (!valid) return EFAULT;
  int victim = -1;
  for (int i = 0; i < WAYS && victim < 0; i++)
    if (!way[i].serial) victim = i;
  if (victim < 0) {
    victim = next_victim[set]++ % WAYS;
    COUNT(e, utlb_evictions, 1);
  }
  way[victim] = (struct translation){ e->serial, page };
  return 0;
}

int utlb_translate(struct endpoint *e, uint64_t offset, uint64_t length) {
  if (offset > VMMC_HEAP_BYTES || length > VMMC_HEAP_BYTES - offset) return EFAULT;
  if (!length) return 0;
  uint32_t hits = 0;
  int error = 0;
  for (uint64_t page = offset / VMMC_PAGE; page <= (offset + length - 1) / VMMC_PAGE && !error; page++)
    error = translate_page(e, (uint32_t)page, &hits);
  COUNT(e, utlb_hits, hits);
  return error;
}

bool utlb_present(struct endpoint *e, uint64_t offset, uint64_t length) {
  if (!length || offset > VMMC_HEAP_BYTES || length > VMMC_HEAP_BYTES - offset) return false;
  const _Atomic uint8_t *table = (const _Atomic uint8_t *)(e->app + VMMC_APP_UTLB);
  uint64_t page = offset / VMMC_PAGE, end = (offset + length - 1) / VMMC_PAGE + 1;
  for (; page < end; page++) {
    enum { TOGETHER = sizeof(uint64_t) }; /* many are looked at together: an export may have 2^18 pages */
    for (; page % TOGETHER == 0 && page + TOGETHER <= end; page += TOGETHER)
      if (atomic_load_explicit((const _Atomic uint64_t *)(table + page), memory_order_acquire) !=
          VMMC_UTLB_VALID * 0x0101010101010101u)
        return false;
    if (page < end && atomic_load_explicit(&table[page], memory_order_acquire) != VMMC_UTLB_VALID) return false;
  }
  return true;
}

void utlb_forget(uint32_t serial) {
  for (int set = 0; set < SETS; set++)
    for (int i = 0; i < WAYS; i++)
      if (cache[set][i].serial == serial) cache[set][i].serial = 0;
}
