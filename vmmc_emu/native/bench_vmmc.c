/*
 * bench_vmmc.c: how fast VMMC sends are beside one memcpy of the same size.
 *
 *   vmmc-bench-vmmc CLUSTER [--size BYTES] [--rounds N] [--seconds S]
 *
 * One process attaches to node 0 and node 1 of a running cluster and sends from the one's heap to the
 * other's; it maps both, so its memcpy runs between the very same pages.  Each round measures all in turn,
 * for S seconds each; the medians over the rounds are printed as one JSON object, rates in bytes a second:
 *
 *   memcpy     one after the other
 *   send       several under way, as a program that has much to move would
 *   blocking   one at a time, each waited for
 *   one_way_us from the call that sends until the last byte is seen at the other end, in microseconds
 */
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vmmc.h"

enum { UNDER_WAY = 4, ROUNDS_MAX = 1000, TIMEOUT_MS = 60000 };
enum { MEMCPY, SEND, BLOCKING, ONE_WAY, KINDS };

struct line { /* from node 1's heap to node 0's */
  struct vmmc_endpoint *receiver, *sender;
  struct vmmc_import target;
  char *source, *destination;
  uint64_t size;
};

static void die(const char *what) {
  fprintf(stderr, "vmmc-bench-vmmc: %s: %s\n", what, strerror(errno));
  exit(1);
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static struct vmmc_endpoint *attach(const char *cluster, int node) {
  struct vmmc_endpoint *endpoint = vmmc_attach(cluster, node);
  if (!endpoint) die("cannot attach to two nodes of that cluster");
  return endpoint;
}

static struct line connect_nodes(const char *cluster, uint64_t size) {
  struct line l = {.size = size, .receiver = attach(cluster, 0), .sender = attach(cluster, 1)};
  l.destination = vmmc_alloc(l.receiver, size);
  l.source = vmmc_alloc(l.sender, size);
  if (!l.destination || !l.source) die("cannot allocate");
  int export = vmmc_export(l.receiver, l.destination, size, NULL, VMMC_WRITE, VMMC_ANYONE);
  if (export < 0) die("cannot export (VMMC_PIN_BYTES must be at least --size)");
  uint32_t number = (uint32_t)vmmc_export_number(l.receiver, export);
  if (vmmc_import_number(l.sender, 0, number, &l.target, TIMEOUT_MS)) die("cannot import");
  memset(l.source, 'x', size);
  return l;
}

static int64_t post(struct line *l) {
  int64_t transfer = vmmc_post_send(l->sender, l->target.id, l->source, l->size, 0, 0, 0);
  if (transfer < 0) die("cannot send");
  return transfer;
}

static void await(struct line *l, int64_t transfer) {
  if (vmmc_wait(l->sender, transfer, TIMEOUT_MS)) die("a send failed");
}

/* Bytes a second of one kind of copying, over at least `seconds`. */
static double measure(struct line *l, int kind, double seconds) {
  int64_t under_way[UNDER_WAY];
  for (int i = 0; kind == SEND && i < UNDER_WAY; i++) under_way[i] = post(l);
  double start = now_s(), end = start;
  uint64_t copies = 0;
  for (; end < start + seconds; end = now_s(), copies++) {
    if (kind == MEMCPY) {
      memcpy(l->destination, l->source, l->size);
      __asm__ volatile("" ::: "memory"); /* every copy is wanted */
    } else if (kind == SEND) {
      int64_t *oldest = &under_way[copies % UNDER_WAY];
      await(l, *oldest);
      *oldest = post(l);
    } else {
      await(l, post(l));
    }
  }
  for (int i = 0; kind == SEND && i < UNDER_WAY; i++) await(l, under_way[i]);
  return (double)(copies * l->size) / (end - start);
}

/* Microseconds of a send's way: both ends are in this process, on one clock. */
static double measure_one_way(struct line *l, double seconds) {
  _Atomic char *seen = (_Atomic char *)l->destination + l->size - 1;
  double start = now_s(), end = start, spent = 0;
  uint64_t sends = 0;
  for (; end < start + seconds; sends++) {
    char mark = (char)~atomic_load_explicit(seen, memory_order_relaxed);
    l->source[l->size - 1] = mark;
    double posted = now_s();
    int64_t transfer = post(l);
    /* acquire: what the NIC stored before the last byte is there as well */
    while (atomic_load_explicit(seen, memory_order_acquire) != mark) sched_yield();
    end = now_s();
    spent += end - posted;
    await(l, transfer);
  }
  return spent / (double)sends * 1e6;
}

static int compare(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, int count) {
  qsort(values, (size_t)count, sizeof *values, compare);
  return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

static void usage(void) {
  fprintf(stderr, "usage: vmmc-bench-vmmc CLUSTER [--size BYTES] [--rounds N] [--seconds S]\n");
  exit(2);
}

int main(int count, char **arguments) {
  double size = 1 << 20, rounds = 5, seconds = 0.3;
  if (count < 2 || count % 2) usage();
  for (int i = 2; i < count; i += 2) {
    double *option = !strcmp(arguments[i], "--size")      ? &size
                     : !strcmp(arguments[i], "--rounds")  ? &rounds
                     : !strcmp(arguments[i], "--seconds") ? &seconds
                                                          : NULL;
    char *end;
    if (!option) usage();
    *option = strtod(arguments[i + 1], &end);
    if (*end || *option <= 0) usage();
  }
  if (size < 1 || size > 1 << 30 || rounds < 1 || rounds > ROUNDS_MAX) usage();

  static double rates[KINDS][ROUNDS_MAX];
  struct line l = connect_nodes(arguments[1], (uint64_t)size);
  for (int kind = 0; kind < ONE_WAY; kind++) measure(&l, kind, seconds / 3); /* warm */
  for (int round = 0; round < (int)rounds; round++) {
    for (int kind = 0; kind < ONE_WAY; kind++) rates[kind][round] = measure(&l, kind, seconds);
    rates[ONE_WAY][round] = measure_one_way(&l, seconds);
  }
  double copy = median(rates[MEMCPY], (int)rounds), send = median(rates[SEND], (int)rounds);
  double blocking = median(rates[BLOCKING], (int)rounds);
  printf("{\"size\": %llu, \"rounds\": %d, \"memcpy\": %.0f, \"send\": %.0f, \"blocking\": %.0f, "
         "\"send_ratio\": %.3f, \"blocking_ratio\": %.3f, \"one_way_us\": %.3f}\n",
         (unsigned long long)l.size, (int)rounds, copy, send, blocking, send / copy, blocking / copy,
         median(rates[ONE_WAY], (int)rounds));
  return vmmc_detach(l.sender) || vmmc_detach(l.receiver);
}
