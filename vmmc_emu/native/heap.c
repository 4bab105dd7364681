/*
 * heap.c: vmmc_alloc and vmmc_free over the heap in the endpoint's segment.
 *
 * Memory is handed out in runs of whole pages, first fit.  A page is committed before it is handed out
 * (a full /dev/shm is ENOMEM here, not a SIGBUS at some later store) and punched out of the segment when
 * it is freed, so that the next owner finds zeros.  Who owns what is remembered beside the segment, in
 * memory that only this process has.
 */
#include <errno.h>
#include <sys/mman.h>

#include "vmmc_private.h"

static char *heap_memory(const struct endpoint *e) { return e->app + VMMC_APP_HEAP; }

int heap_start(struct vmmc_endpoint *v) {
  size_t bytes = VMMC_HEAP_PAGES * sizeof(struct page);
  void *memory =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return ENOMEM;
  v->heap = (struct heap){.page = memory};
  return 0;
}

void heap_stop(struct vmmc_endpoint *v) {
  munmap(v->heap.page, VMMC_HEAP_PAGES * sizeof(struct page));
  v->heap.page = NULL;
}

/* Both ends of a run say how long it is, so that its neighbours find it. */
static void run_set(struct heap *heap, uint32_t first, uint32_t pages) {
  heap->page[first].run = heap->page[first + pages - 1].run = pages;
}

static bool is_allocated(const struct heap *heap, uint32_t page) {
  return heap->page[page].flags & PAGE_ALLOCATED;
}

/* Takes the first free run that is long enough; false: none. */
static bool run_take(struct heap *heap, uint32_t pages, uint32_t *first) {
  uint32_t at = 0;
  while (at < heap->top && (is_allocated(heap, at) || heap->page[at].run < pages)) at += heap->page[at].run;
  if (at < heap->top) {
    uint32_t left = heap->page[at].run - pages;
    if (left) run_set(heap, at + pages, left);
  } else {
    if (pages > VMMC_HEAP_PAGES - heap->top) return false;
    heap->top += pages;
  }
  run_set(heap, at, pages);
  heap->page[at].flags |= PAGE_FIRST;
  for (uint32_t i = 0; i < pages; i++) heap->page[at + i].flags |= PAGE_ALLOCATED;
  *first = at;
  return true;
}

/* Gives a run back, joined with free neighbours. */
static void run_give(struct heap *heap, uint32_t first, uint32_t pages) {
  for (uint32_t i = 0; i < pages; i++)
    heap->page[first + i].flags &= ~(uint32_t)(PAGE_ALLOCATED | PAGE_FIRST);
  uint32_t after = first + pages;
  if (after < heap->top && !is_allocated(heap, after)) pages += heap->page[after].run;
  if (first && !is_allocated(heap, first - 1)) {
    uint32_t before = heap->page[first - 1].run;
    first -= before;
    pages += before;
  }
  if (first + pages == heap->top)
    heap->top = first;
  else
    run_set(heap, first, pages);
}

void *vmmc_alloc(struct vmmc_endpoint *v, uint64_t length) {
  if (!call_begin(v)) return NULL;
  if (length == 0 || length > VMMC_HEAP_BYTES) {
    errno = length ? ENOMEM : EINVAL;
    return NULL;
  }
  uint32_t pages = (uint32_t)((length + VMMC_PAGE - 1) / VMMC_PAGE), first = 0;
  size_t bytes = (size_t)pages * VMMC_PAGE;
  critical_lock(&v->lock);
  bool taken = run_take(&v->heap, pages, &first);
  critical_unlock(&v->lock);
  if (!taken) {
    errno = ENOMEM;
    return NULL;
  }
  /* The run is ours: committing it, which may take long, needs no lock. */
  char *memory = heap_memory(v->endpoint) + (uint64_t)first * VMMC_PAGE;
  if (madvise(memory, bytes, MADV_POPULATE_WRITE) == 0) return memory;
  /* The kernel says EFAULT where a store would have met SIGBUS. */
  int error = errno == EFAULT || errno == EAGAIN ? ENOMEM : errno;
  madvise(memory, bytes, MADV_REMOVE);
  critical_lock(&v->lock);
  run_give(&v->heap, first, pages);
  critical_unlock(&v->lock);
  errno = error;
  return NULL;
}

int vmmc_free(struct vmmc_endpoint *v, void *memory) {
  if (!memory) return 0;
  if (!call_begin(v)) return -1;
  uint64_t offset = (uint64_t)((char *)memory - heap_memory(v->endpoint));
  if ((char *)memory < heap_memory(v->endpoint) || offset >= VMMC_HEAP_BYTES || offset % VMMC_PAGE)
    return fail(EINVAL);
  uint32_t first = (uint32_t)(offset / VMMC_PAGE);
  critical_lock(&v->lock);
  struct heap *heap = &v->heap;
  int error = 0;
  commands_advance(v); /* what was waited for by nobody may be over */
  if (!(heap->page[first].flags & PAGE_FIRST)) error = EINVAL;
  uint32_t pages = error ? 0 : heap->page[first].run;
  for (uint32_t i = 0; i < pages && !error; i++)
    if (heap->page[first + i].users) error = EBUSY;
  if (!error) {
    for (uint32_t i = 0; i < pages; i++)
      if (heap->page[first + i].flags & PAGE_PINNED) utlb_unpin(v, first + i);
    madvise(memory, (size_t)pages * VMMC_PAGE, MADV_REMOVE);
    run_give(heap, first, pages);
  }
  critical_unlock(&v->lock);
  return error ? fail(error) : 0;
}

bool heap_offset(const struct vmmc_endpoint *v, const void *memory, uint64_t length, uint64_t *offset) {
  const char *heap = heap_memory(v->endpoint), *at = memory;
  if (at < heap || (uint64_t)(at - heap) > VMMC_HEAP_BYTES) return false;
  uint64_t from = (uint64_t)(at - heap);
  if (length > VMMC_HEAP_BYTES - from) return false;
  for (uint64_t page = from / VMMC_PAGE; length && page <= (from + length - 1) / VMMC_PAGE; page++)
    if (!is_allocated(&v->heap, (uint32_t)page)) return false;
  *offset = from;
  return true;
}

bool heap_contains(const struct endpoint *e, const void *address) {
  const char *heap = heap_memory(e), *at = address;
  return at >= heap && at < heap + VMMC_HEAP_BYTES;
}

bool heap_hold(struct endpoint *e, const void *address, uint64_t length, uint64_t *offset) {
  if (!heap_contains(e, address)) return false;
  struct vmmc_endpoint *v = e->vmmc;
  if (!v) return false; /* nobody has allocated anything */
  critical_lock(&v->lock);
  bool held = heap_offset(v, address, length, offset) && utlb_hold_all(v, *offset, length) == 0;
  critical_unlock(&v->lock);
  return held;
}

void heap_release(struct endpoint *e, uint64_t offset, uint64_t length) {
  struct vmmc_endpoint *v = e->vmmc;
  critical_lock(&v->lock);
  utlb_release(v, offset, length);
  critical_unlock(&v->lock);
}
