/*
 * utlb.c: which pages of the heap are pinned: entered in the table that the NIC translates by.
 *
 * A page is pinned when an export, a redirection or a transfer needs it, and stays so until the room
 * is wanted: never more than the bound is pinned, and the page unpinned first is the one that has been
 * without users for longest.  A page with users stays: the NIC may be writing into it.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "vmmc_private.h"

#define PIN_BYTES_DEFAULT (64ull << 20)

static uint64_t limit_from_environment(void) {
  const char *text = getenv("VMMC_PIN_BYTES");
  if (!text || !*text) return PIN_BYTES_DEFAULT;
  char *end;
  errno = 0;
  unsigned long long bytes = strtoull(text, &end, 10);
  if (errno || *end || text[0] < '0' || text[0] > '9' || bytes < VMMC_PAGE) {
    fprintf(stderr, "vmmc: VMMC_PIN_BYTES=%s is not a number of bytes from %d up: using %llu\n", text,
            VMMC_PAGE, (unsigned long long)PIN_BYTES_DEFAULT);
    return PIN_BYTES_DEFAULT;
  }
  return bytes < VMMC_HEAP_BYTES ? bytes : VMMC_HEAP_BYTES;
}

void utlb_start(struct vmmc_endpoint *v) {
  v->utlb = (struct utlb){.limit = limit_from_environment() / VMMC_PAGE};
}

static _Atomic uint8_t *entry(const struct vmmc_endpoint *v, uint64_t page) {
  return (_Atomic uint8_t *)(v->endpoint->app + VMMC_APP_UTLB) + page;
}

/* The table's own pages for the entries [first, end). */
static bool commit_entries(struct vmmc_endpoint *v, uint64_t first, uint64_t end) {
  for (uint64_t page = first / VMMC_PAGE; page <= (end - 1) / VMMC_PAGE; page++) {
    if (v->utlb.committed >> page & 1) continue;
    if (endpoint_commit((const void *)entry(v, page * VMMC_PAGE), VMMC_PAGE, true)) return false;
    v->utlb.committed |= 1ull << page;
  }
  return true;
}

static bool has_entry(const struct vmmc_endpoint *v, uint64_t page) {
  return v->utlb.committed >> (page / VMMC_PAGE) & 1 && atomic_load_explicit(entry(v, page), memory_order_relaxed);
}

/* ---- the list of pages that may be unpinned, from the oldest to the newest ---- */

static void list_remove(struct vmmc_endpoint *v, uint32_t index) {
  struct page *pages = v->heap.page, *p = &pages[index];
  *(p->older == NO_PAGE ? &v->utlb.oldest : &pages[p->older - 1].newer) = p->newer;
  *(p->newer == NO_PAGE ? &v->utlb.newest : &pages[p->newer - 1].older) = p->older;
  p->older = p->newer = NO_PAGE;
}

static void list_append(struct vmmc_endpoint *v, uint32_t index) {
  struct page *pages = v->heap.page, *p = &pages[index];
  p->older = v->utlb.newest;
  p->newer = NO_PAGE;
  *(p->older == NO_PAGE ? &v->utlb.oldest : &pages[p->older - 1].newer) = index + 1;
  v->utlb.newest = index + 1;
}

/* ---- pin and unpin ---- */

void utlb_unpin(struct vmmc_endpoint *v, uint32_t page) {
  list_remove(v, page);
  /* Nobody uses it: every command that named it was answered, so the NIC is done with it.  Where there was no memory
   * for the table it has no entry, and a store would be a SIGBUS. */
  if (has_entry(v, page)) atomic_store_explicit(entry(v, page), 0, memory_order_release);
  v->heap.page[page].flags &= ~(uint32_t)PAGE_PINNED;
  v->utlb.pinned--;
}

static bool make_room(struct vmmc_endpoint *v) {
  if (v->utlb.pinned < v->utlb.limit) return true;
  if (v->utlb.oldest == NO_PAGE) return false;
  utlb_unpin(v, v->utlb.oldest - 1);
  COUNT_APP(v, utlb_unpins, 1);
  return true;
}

static void page_release(struct vmmc_endpoint *v, uint32_t page) {
  struct page *p = &v->heap.page[page];
  if (--p->users) return;
  v->utlb.in_use--;
  list_append(v, page);
}

uint64_t utlb_hold(struct vmmc_endpoint *v, uint64_t offset, uint64_t length, int *error) {
  *error = 0;
  if (!length) return 0;
  uint64_t first = offset / VMMC_PAGE, end = (offset + length - 1) / VMMC_PAGE + 1, upto = first, fresh = 0;
  /* Those pinned already first: making room for the others must not unpin them. */
  for (uint64_t page = first; page < end; page++) {
    struct page *p = &v->heap.page[page];
    if (!(p->flags & PAGE_PINNED)) continue;
    if (p->users++) continue;
    list_remove(v, (uint32_t)page);
    v->utlb.in_use++;
  }
  for (; upto < end; upto++) {
    struct page *p = &v->heap.page[upto];
    if (p->flags & PAGE_PINNED) continue;
    if (!make_room(v)) break;
    p->flags |= PAGE_PINNED;
    p->users = 1;
    v->utlb.pinned++;
    v->utlb.in_use++;
    fresh++;
  }
  for (uint64_t page = upto; page < end; page++) /* behind the one that found no room */
    if (v->heap.page[page].flags & PAGE_PINNED) page_release(v, (uint32_t)page);

  if (fresh) {
    char *memory = v->endpoint->app + VMMC_APP_HEAP + first * VMMC_PAGE;
    if (madvise(memory, (upto - first) * VMMC_PAGE, MADV_POPULATE_WRITE) || !commit_entries(v, first, upto)) {
      *error = ENOMEM;
      for (uint64_t page = first; page < upto; page++) {
        page_release(v, (uint32_t)page);
        /* Those that were pinned only now have no entry yet. */
        if (!v->heap.page[page].users && !has_entry(v, page))
          utlb_unpin(v, (uint32_t)page);
      }
      return 0;
    }
    /* release: the page is there before the NIC can find it in the table */
    for (uint64_t page = first; page < upto; page++)
      atomic_store_explicit(entry(v, page), VMMC_UTLB_VALID, memory_order_release);
    COUNT_APP(v, utlb_pins, fresh);
  }
  if (upto == first) return 0;
  uint64_t held = upto * VMMC_PAGE - offset;
  return held < length ? held : length;
}

int utlb_hold_all(struct vmmc_endpoint *v, uint64_t offset, uint64_t length) {
  int error;
  uint64_t held = utlb_hold(v, offset, length, &error);
  if (held == length) return 0;
  utlb_release(v, offset, held);
  return ENOMEM;
}

void utlb_release(struct vmmc_endpoint *v, uint64_t offset, uint64_t length) {
  if (!length) return;
  for (uint64_t page = offset / VMMC_PAGE; page <= (offset + length - 1) / VMMC_PAGE; page++)
    page_release(v, (uint32_t)page);
}

int vmmc_pinned(struct vmmc_endpoint *v, struct vmmc_pinned *pinned) {
  if (!call_begin(v)) return -1;
  if (!pinned) return fail(EINVAL);
  const struct vmmc_app_counters *counters = &app_header(v->endpoint)->counters;
  pthread_mutex_lock(&v->lock);
  *pinned = (struct vmmc_pinned){
      .limit_bytes = v->utlb.limit * VMMC_PAGE,
      .pinned_bytes = v->utlb.pinned * VMMC_PAGE,
      .in_use_bytes = v->utlb.in_use * VMMC_PAGE,
      .pins = atomic_load_explicit(&counters->utlb_pins, memory_order_relaxed),
      .unpins = atomic_load_explicit(&counters->utlb_unpins, memory_order_relaxed),
  };
  pthread_mutex_unlock(&v->lock);
  return 0;
}
