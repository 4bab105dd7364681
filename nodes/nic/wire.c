/*
 * wire.c: what a link runs over, at the end where packets arrive.  It is perfect unless the daemon says
 * otherwise, and then out of the way (link.c reads the peer's queue itself); faults are here and nowhere else.
 *
 * A packet that enters is lost, or begins when the rate allows and arrives after the delay, in its turn, or
 * later than its turn, or twice, or with bits flipped.  Every such decision is a function of the seed, the
 * direction, the packet's number and how many times it was sent: a run can be repeated.
 */
#include <stdlib.h>
#include <string.h>

#include "link.h"

enum {
  HEADER_BYTES = 64,      /* of a packet, as far as rates are concerned */
  HOLD_NS = 50000,        /* a packet that is held back is so by this and half the delay, up to twice */
  UNDER_WAY_MAX = 65536,  /* packets, whatever limit is set: memory is not endless */
  PAYLOAD_MAX = 256 * 1024,
  FLIPS_MAX = 3,          /* bits: up to so many CRC32C is certain to find, in frames of any size here */
};
#define UNREACHABLE_NS 10000000000ull /* of silence, unless something else is set */
#define BILLION 1000000000u

/* ---- settings ---- */

bool wire_is_perfect(uint32_t from) {
  const struct vmmc_control_wire *w = &nic.state->wire[from];
  return !w->kind || (w->up && !w->loss_ppb && !w->corrupt_ppb && !w->duplicate_ppb && !w->reorder_ppb && !w->delay_ns &&
                      !w->rate_bits_per_s && !w->limit_packets && !w->stream_packet_ns &&
                      !w->stream_redirected_ps_per_byte && !w->stream_default_ps_per_byte);
}

void wire_set(const struct vmmc_control_wire *settings) {
  uint32_t from = settings->from;
  if (from >= nic.nodes || from == nic.node) {
    log_event("warning", "the daemon told of a wire from node %u", from);
    return;
  }
  struct vmmc_control_wire *known = &nic.state->wire[from];
  uint64_t at = offsetof(struct node_state, wire) + from * sizeof *settings;
  if (!segment_commit(nic.state_fd, at, sizeof *settings)) return; /* said in the log */
  if (!memcmp(known, settings, sizeof *settings)) return; /* told again */
  /* Kept where a successor finds it, before it is told anything: a wire that is cut stays cut. */
  *known = *settings;
  log_event("info", "the wire from node%u is %s", from,
            wire_is_perfect(from) ? "perfect" : settings->up ? "not perfect" : "cut");
  struct link *link = nic.link[from];
  if (!link) return; /* link_to() will look */
  wire_publish(link);
  retransmit_update(link, true);
  COUNT_LINK(link, wire_changes, 1);
}

static uint64_t mix(uint64_t x) { /* splitmix64: Steele, Lea, Flood: Fast splittable pseudorandom number generators */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

void wire_become(struct wire *wire, uint32_t from) {
  wire->set = nic.state->wire[from];
  if (!wire->set.kind) wire->set = (struct vmmc_control_wire){ .up = 1 };
  wire->key = mix(mix(wire->set.seed) ^ ((uint64_t)from << 32 | nic.node));
  wire->free_ns = wire->last_ns = 0; /* what is under way keeps its time */
}

void wire_end(struct wire *wire) {
  free(wire->heap);
  wire_put_down();
}

static uint64_t ps_per_byte(const struct wire *wire) {
  return wire->set.rate_bits_per_s ? 8000000000000u / wire->set.rate_bits_per_s : 0;
}

uint64_t wire_time(const struct wire *wire, uint64_t bytes) { return bytes * ps_per_byte(wire) / 1000; }

/* ---- chance ---- */

enum draw { LOSS, CORRUPT, DUPLICATE, REORDER, JITTER, HOLD, OF_ACKNOWLEDGEMENT = 16 };

static uint64_t draw(const struct wire *wire, enum draw what, const struct link_frame *frame, uint64_t number) {
  uint64_t of = what + (frame->kind == FRAME_ACKNOWLEDGE ? OF_ACKNOWLEDGEMENT : 0);
  return mix(mix(mix(wire->key + of) ^ number) + (frame->kind == FRAME_ACKNOWLEDGE ? 0 : frame->attempt));
}

/* A number of [0, range) from a random one. */
static uint64_t scaled(uint64_t random, uint64_t range) { return (uint64_t)((unsigned __int128)random * range >> 64); }

static bool happens(uint64_t random, uint32_t ppb) { return scaled(random, BILLION) < ppb; }

/* ---- packets under way: a heap, the next to arrive on top ---- */

static bool before(const struct flight *a, const struct flight *b) {
  return a->arrives_ns != b->arrives_ns ? a->arrives_ns < b->arrives_ns : a->order < b->order;
}

static bool push(struct wire *wire, const struct flight *flight) {
  if (wire->count == wire->size) {
    uint32_t size = wire->size ? wire->size * 2 : 512;
    /* packets are aligned to lines: malloc, and with it realloc, aligns less */
    struct flight *heap = size > UNDER_WAY_MAX ? NULL : aligned_alloc(_Alignof(struct flight), size * sizeof *heap);
    if (!heap) return false;
    if (wire->count) memcpy(heap, wire->heap, wire->count * sizeof *heap);
    free(wire->heap);
    wire->heap = heap;
    wire->size = size;
  }
  uint32_t at = wire->count++;
  for (; at && before(flight, &wire->heap[(at - 1) / 2]); at = (at - 1) / 2) wire->heap[at] = wire->heap[(at - 1) / 2];
  wire->heap[at] = *flight;
  return true;
}

static void pop(struct wire *wire, struct flight *top) {
  *top = wire->heap[0];
  const struct flight last = wire->heap[--wire->count];
  uint32_t at = 0;
  for (uint32_t child; (child = 2 * at + 1) < wire->count; at = child) {
    if (child + 1 < wire->count && before(&wire->heap[child + 1], &wire->heap[child])) child++;
    if (!before(&wire->heap[child], &last)) break;
    wire->heap[at] = wire->heap[child];
  }
  if (wire->count) wire->heap[at] = last;
}

uint64_t wire_due(const struct wire *wire) { return wire->count ? wire->heap[0].arrives_ns : UINT64_MAX; }

static bool has_payload(const struct packet *p) {
  return p->type == PACKET_DATA || p->type == PACKET_SEND || (p->type == PACKET_FETCHED && !p->error);
}

uint64_t wire_bytes(const struct packet *p) { return HEADER_BYTES + (has_payload(p) ? p->length : 0); }

static void drop(struct link *link) {
  COUNT_LINK(link, wire_dropped, 1);
  COUNT_NODE(wire_dropped, 1);
}

void wire_enter(struct link *link, struct wire *wire, const struct link_frame *frame, uint64_t number,
                uint64_t bytes, uint64_t now_ns) {
  const struct vmmc_control_wire *set = &wire->set;
  COUNT_LINK(link, wire_packets, 1);
  if (!set->up || happens(draw(wire, LOSS, frame, number), set->loss_ppb) ||
      (set->limit_packets && wire->count >= set->limit_packets)) {
    drop(link);
    return;
  }
  struct flight flight = { .order = wire->order++, .frame = *frame };
  wire->free_ns = (wire->free_ns > now_ns ? wire->free_ns : now_ns) + wire_time(wire, bytes);
  flight.arrives_ns = wire->free_ns + set->delay_ns - set->jitter_ns;
  if (set->jitter_ns) flight.arrives_ns += scaled(draw(wire, JITTER, frame, number), 2 * set->jitter_ns + 1);
  if (happens(draw(wire, REORDER, frame, number), set->reorder_ppb)) {
    uint64_t hold_ns = HOLD_NS + set->delay_ns / 2;
    flight.arrives_ns += hold_ns + scaled(draw(wire, HOLD, frame, number), hold_ns);
    COUNT_LINK(link, wire_reordered, 1);
    COUNT_NODE(wire_reordered, 1);
  } else { /* in its turn, whatever the jitter */
    if (flight.arrives_ns < wire->last_ns) flight.arrives_ns = wire->last_ns;
    wire->last_ns = flight.arrives_ns;
  }
  uint64_t flips = draw(wire, CORRUPT, frame, number);
  if (happens(flips, set->corrupt_ppb)) {
    flight.flips = mix(flips) | 1;
    COUNT_LINK(link, wire_corrupted, 1);
    COUNT_NODE(wire_corrupted, 1);
  }
  bool twice = happens(draw(wire, DUPLICATE, frame, number), set->duplicate_ppb);
  if (!push(wire, &flight)) {
    drop(link);
    return;
  }
  if (!twice) return;
  flight.order = wire->order++;
  if (!push(wire, &flight)) return;
  COUNT_LINK(link, wire_duplicated, 1);
  COUNT_NODE(wire_duplicated, 1);
}

bool wire_arrived(struct link *link, struct wire *wire, uint64_t now_ns, struct flight *flight) {
  while (wire->count && wire->heap[0].arrives_ns <= now_ns) {
    pop(wire, flight);
    if (wire->set.up) return true;
    drop(link); /* cut while it was under way */
  }
  return false;
}

/* ---- carrying bytes that may be corrupted ---- */

static char *carrier;      /* a frame: header, payload, checksum */
static const char *carried; /* the payload in it, NULL: none is carried */

const char *link_carried(void) { return carried; }

void wire_put_down(void) { carried = NULL; }

static uint32_t crc32c_portable(const unsigned char *bytes, size_t length) {
  static uint32_t table[256];
  if (!table[1])
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; bit++) c = c & 1 ? 0x82f63b78u ^ c >> 1 : c >> 1;
      table[i] = c;
    }
  uint32_t crc = ~0u;
  while (length--) crc = table[(crc ^ *bytes++) & 255] ^ crc >> 8;
  return ~crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t crc32c_by_processor(const unsigned char *bytes, size_t length) {
  uint64_t crc = ~0u, word;
  for (; length >= sizeof word; bytes += sizeof word, length -= sizeof word) {
    memcpy(&word, bytes, sizeof word);
    crc = __builtin_ia32_crc32di(crc, word);
  }
  while (length--) crc = __builtin_ia32_crc32qi((uint32_t)crc, *bytes++);
  return ~(uint32_t)crc;
}
#endif

static uint32_t crc32c(const void *bytes, size_t length) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("sse4.2")) return crc32c_by_processor(bytes, length);
#endif
  return crc32c_portable(bytes, length);
}

/* Sends the frame of so many bytes across: what the sender's NIC computes, what the wire flips, what the
 * receiver's NIC checks. */
static bool cross(char *frame, size_t length, uint64_t flips) {
  uint32_t checksum = crc32c(frame, length);
  memcpy(frame + length, &checksum, sizeof checksum);
  if (flips) {
    uint64_t bits = (length + sizeof checksum) * 8;
    for (uint64_t i = 0, count = 1 + flips % FLIPS_MAX, random = flips; i < count; i++) {
      random = mix(random);
      /* Of each part of the frame one: two flips of the same bit would be none. */
      uint64_t bit = bits * i / count + scaled(random, bits * (i + 1) / count - bits * i / count);
      frame[bit / 8] = (char)(frame[bit / 8] ^ 1 << bit % 8);
    }
  }
  memcpy(&checksum, frame + length, sizeof checksum);
  return crc32c(frame, length) == checksum;
}

/* What the packet refers to in its sender's memory.  False: it cannot be read, as whoever handles it will find. */
static bool gather(struct link *link, const struct packet *p, char *to) {
  bool stream = p->type == PACKET_DATA;
  if (p->length > PAYLOAD_MAX || (stream ? p->from.slot >= VMMC_SLOTS : p->position > VMMC_HEAP_BYTES - p->length))
    return false;
  struct remote *remote = remote_find(link->node, p->from.serial);
  if (!remote) return false;
  int error;
  if (stream) {
    const char *ring = remote->app + VMMC_APP_RINGS + (uint64_t)p->from.slot * VMMC_RING;
    uint64_t offset = p->offset % VMMC_RING, first = VMMC_RING - offset;
    if (first > p->length) first = p->length;
    error = dma_copy(to, ring + offset, first);
    if (!error) error = dma_copy(to + first, ring, p->length - first);
  } else {
    error = dma_copy(to, remote->app + VMMC_APP_HEAP + p->position, p->length);
  }
  remote_release(remote);
  return !error;
}

bool wire_carry(struct link *link, const struct packet *p, uint64_t flips) {
  carried = NULL;
  if (!carrier && !(carrier = malloc(sizeof *p + PAYLOAD_MAX + sizeof(uint32_t)))) {
    log_event("error", "out of memory: a packet from node%u is lost", link->node);
    return false;
  }
  memcpy(carrier, p, sizeof *p);
  bool payload = has_payload(p) && gather(link, p, carrier + sizeof *p);
  if (!cross(carrier, sizeof *p + (payload ? p->length : 0), flips)) return false;
  if (payload) carried = carrier + sizeof *p;
  return true;
}

bool wire_carry_frame(const struct link_frame *frame, uint64_t flips) {
  char bytes[sizeof *frame + sizeof(uint32_t)];
  memcpy(bytes, frame, sizeof *frame);
  return cross(bytes, sizeof *frame, flips);
}

/* ---- what the peer is told, whose link has to cope with it ---- */

void wire_publish(struct link *link) {
  struct link_queue *out = link->out;
  struct wire wire = { 0 };
  wire_become(&wire, link->node);
  const struct vmmc_control_wire *set = &wire.set;
  uint64_t delay_ns = set->delay_ns + set->jitter_ns;
  uint64_t unreachable_ns = set->unreachable_ns ? set->unreachable_ns : UNREACHABLE_NS;
  atomic_store_explicit(&out->wire_delay_ns, delay_ns, memory_order_relaxed);
  atomic_store_explicit(&out->wire_ps_per_byte, ps_per_byte(&wire), memory_order_relaxed);
  atomic_store_explicit(&out->wire_unreachable_ns, unreachable_ns, memory_order_relaxed);
  uint32_t before_now = atomic_load_explicit(&out->wire, memory_order_relaxed);
  static uint32_t change;
  if (!change) change = (uint32_t)vmmc_now_ns(); /* a successor's numbers are others */
  if (!++change) ++change;
  uint32_t now = wire_is_perfect(link->node) ? 0 : change;
  /* release: the peer that sees it changed sees the rest */
  if (now || before_now) atomic_store_explicit(&out->wire, now, memory_order_release);
}
