/*
 * link.c: the ordered channel to another NIC: one queue a direction, one producer, one consumer.
 *
 * A link is made when two nodes first talk: each side makes the queue that it writes.  Work waits in
 * the link's queue until there is room, so a slow peer holds up nobody else.  Answers never wait for
 * room (they would deadlock two NICs whose queues are both full): they go to an outbox that is emptied
 * first.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "link.h"

enum {
  RECEIVE_SHARE = 64,  /* packets of one link before the next has its turn */
  TRANSMIT_SHARE = 64, /* works of one link likewise */
  LANE_SHARE = 64 * 1024, /* bytes of one program before the next has its turn: a stream's packet */
};

uint32_t link_node(const struct link *link) { return link->node; }

/* Tells the supervisor of a node that is on, and whose door somebody removed or cut.  errno stays. */
static void report_missing_door(uint32_t node) {
  int error = errno;
  const struct vmmc_pub *pub = error == ENOENT || error == EPROTO ? segment_map(node, "pub", sizeof *pub, false, NULL) : NULL;
  if (pub && pub->magic == VMMC_MAGIC && pub->boot > nic.lost[node]) {
    log_event("error", "shared memory of node%u was removed or truncated (door)", node);
    control_say(VMMC_CONTROL_DAMAGED, 0, pub->boot, (int32_t)node);
  }
  if (pub) munmap((void *)pub, sizeof *pub);
  errno = error;
}

struct link *link_to(uint32_t node) {
  if (node >= nic.nodes) {
    errno = EHOSTUNREACH;
    return NULL;
  }
  if (nic.link[node]) return nic.link[node];
  struct link *link = calloc(1, sizeof *link);
  if (!link) return NULL;
  char what[32];
  snprintf(what, sizeof what, "link.node%u", node);
  link->node = node;
  link->door = segment_map(node, "door", sizeof *link->door, true, NULL);
  if (!link->door) report_missing_door(node);
  link->pub = link->door ? segment_map(node, "pub", sizeof *link->pub, false, NULL) : NULL;
  /* Its NIC has yet to begin, or has yet to end: the node lost its power, as we have been told already. */
  if (link->pub && (link->pub->magic != VMMC_MAGIC || link->pub->boot <= nic.lost[node])) {
    munmap((void *)link->pub, sizeof *link->pub);
    link->pub = NULL;
    errno = ENOENT;
  }
  link->out = link->pub ? segment_make(nic.node, what, sizeof *link->out) : NULL;
  /* Room for the peer's queue as well: an answer must not fail for want of memory, who asks can be told. */
  char back[32];
  snprintf(back, sizeof back, "link.node%u", nic.node);
  struct link_queue *in = link->out ? segment_make(node, back, sizeof *in) : NULL;
  if (!in) {
    int error = errno == ENOENT ? EHOSTUNREACH : errno;
    if (errno == ENOENT)
      log_event("warning", "no link to node%u: it is off", node);
    else
      log_event("error", "no link to node%u: %s", node, strerror(errno));
    if (link->door) munmap(link->door, sizeof *link->door);
    if (link->pub) munmap((void *)link->pub, sizeof *link->pub);
    if (link->out) munmap(link->out, sizeof *link->out);
    free(link);
    errno = error;
    return NULL;
  }
  /* A queue that its reader has taken packets from, and that is not there, or is empty: somebody removed or truncated
   * it, and what was in it nobody knows. */
  bool new_out = link->out->header.magic != VMMC_MAGIC, new_in = in->header.magic != VMMC_MAGIC;
  if (new_out && !new_in && in->header.peer_boot == nic.boot && atomic_load(&in->taken)) nic_end_damaged(what);
  bool peer_damaged = new_in && !new_out && link->out->header.peer_boot == link->pub->boot && atomic_load(&link->out->taken);
  munmap(in, sizeof *in); /* the peer's to write; link_opened maps it to read */
  if (peer_damaged) {
    log_event("error", "shared memory of node%u was removed or truncated (%s)", node, back);
    control_say(VMMC_CONTROL_DAMAGED, 0, link->pub->boot, (int32_t)node);
  }
  if (new_out) {
    link->out->header.version = VMMC_LAYOUT_VERSION;
    link->out->header.peer_boot = link->pub->boot;
    atomic_store_explicit(&link->out->want_room, UINT64_MAX, memory_order_relaxed);
    link->out->header.magic = VMMC_MAGIC;
  }
  link->tail = atomic_load_explicit(&link->out->tail, memory_order_relaxed);
  link->taken = atomic_load_explicit(&link->out->taken, memory_order_relaxed);
  /* The next one, which it may not have counted yet. */
  link->again = atomic_load_explicit(&nic.pub->incarnation, memory_order_relaxed) > 1 ? link->taken + 1 : 0;
  link->outbox_end = &link->outbox;
  link->incarnation = atomic_load(&link->pub->incarnation);
  nic.link[node] = link;
  retransmit_recover(link);
  return link;
}

/* The peer's queue, once it has made it. */
bool link_opened(struct link *link) {
  if (link->in) return true;
  if (link->node == nic.node) {
    link->in = link->out;
    return true;
  }
  char what[32];
  snprintf(what, sizeof what, "link.node%u", nic.node);
  const struct link_queue *in = segment_map(link->node, what, sizeof *in, false, NULL);
  /* A queue of another boot was made for what this node was before it lost its power: its maker will be told. */
  if (in && in->header.magic == VMMC_MAGIC && in->header.peer_boot == nic.boot)
    link->in = in;
  else if (in)
    munmap((void *)in, sizeof *in);
  return link->in != NULL;
}

static uint64_t taken_by_peer(struct link *link) {
  if (link->retransmit) return retransmit_acknowledged(link);
  /* acquire: the peer has read the packets before it says so */
  return link_opened(link) ? atomic_load_explicit(&link->in->taken, memory_order_acquire) : 0;
}

uint32_t link_welcomes(uint32_t node, const struct vmmc_address *to) {
  struct link *link = node != nic.node ? nic.link[node] : NULL; /* this NIC's own answer is here as soon */
  if (!link || !link->in || link->retransmit) return 0;
  /* The wire may not be perfect any more, or the node have lost its power, and we have yet to hear.  relaxed: each word
   * speaks for itself. */
  bool as_it_was = !atomic_load_explicit(&link->in->wire, memory_order_relaxed) &&
                   atomic_load_explicit(&link->pub->nic_pid, memory_order_relaxed);
  return as_it_was ? port_welcomes(link->pub, to) : 0;
}

uint64_t link_tail(const struct link *link) { return link->tail; }

uint64_t link_acknowledged(const struct link *link) { return taken_by_peer((struct link *)link); }

bool link_room(const struct link *link) {
  return link->tail - taken_by_peer((struct link *)link) < LINK_PACKETS;
}

struct packet *link_next(struct link *link) {
  struct packet *p = &link->out->packet[link->tail % LINK_PACKETS];
  memset(p, 0, sizeof *p);
  return p;
}

void link_push(struct link *link) {
  link->out->packet[link->tail % LINK_PACKETS].sequence = link->tail;
  link->tail++;
  /* release: the packet, and the bytes that it refers to, before the count that publishes it */
  atomic_store_explicit(&link->out->tail, link->tail, memory_order_release);
  link->unrung = true;
  if (link->retransmit) retransmit_sent(link);
  COUNT_NODE(packets_sent, 1);
}

/* Tells the peer to look; wakes it when it sleeps. */
static void link_ring(struct link *link) {
  uint64_t bit = 1ull << nic.node % 64;
  _Atomic uint64_t *word = &link->door->link[nic.node / 64];
  uint64_t summary_bit = 1ull << nic.node / 64;
  link->unrung = false;
  /* Our stores come before the look at the bits, the peer clears them before it looks at our stores:
   * a bit found set will still be cleared, and then our stores be seen. */
  atomic_thread_fence(memory_order_seq_cst);
  if (!(atomic_load_explicit(word, memory_order_relaxed) & bit)) atomic_fetch_or(word, bit);
  if (!(atomic_load(&link->door->summary) & summary_bit)) atomic_fetch_or(&link->door->summary, summary_bit);
  atomic_thread_fence(memory_order_seq_cst);
  if (link->node != nic.node && atomic_load_explicit(&link->pub->asleep, memory_order_relaxed)) {
    /* Changed before the wake: a peer past its last look, but not yet asleep, finds it changed. */
    atomic_fetch_add(&link->door->bell, 1);
    vmmc_futex_wake(&link->door->bell);
  }
}

/* Rings our own door. */
void link_look_again(struct link *link) {
  atomic_fetch_or(&nic.door->link[link->node / 64], 1ull << link->node % 64);
  atomic_fetch_or(&nic.door->summary, 1ull << link->node / 64);
}

void link_activate(struct link *link) {
  if (link->in_busy_links) return;
  link->in_busy_links = true;
  link->next_busy = nic.busy_links;
  nic.busy_links = link;
}

/* A lane goes to the end of the queue. */
static void lane_enqueue(struct link *link, struct lane *lane) {
  lane->next = NULL;
  if (link->last)
    link->last->next = lane;
  else
    link->first = lane;
  link->last = lane;
}

static struct lane *lane_dequeue(struct link *link) {
  struct lane *lane = link->first;
  link->first = lane->next;
  if (!link->first) link->last = NULL;
  return lane;
}

void link_enqueue(struct link *link, struct work *work) {
  link_activate(link);
  if (work->queued == link) return;
  if (work->queued) link_forget(work->queued, work); /* it was left there: that link had no room to find out */
  struct lane *lane = &link->lane[work->lane];
  work->queued = link;
  work->next = NULL;
  if (lane->first)
    lane->last->next = work;
  else
    lane->first = work;
  lane->last = work;
  if (lane->first == work && lane != link->serving) lane_enqueue(link, lane);
}

static void lane_forget(struct link *link, struct lane *lane) {
  for (struct lane **at = &link->first, *previous = NULL; *at; previous = *at, at = &(*at)->next) {
    if (*at != lane) continue;
    *at = lane->next;
    if (link->last == lane) link->last = previous;
    return;
  }
}

void link_forget(struct link *link, struct work *work) {
  struct lane *lane = &link->lane[work->lane];
  for (struct work **at = &lane->first, *previous = NULL; *at; previous = *at, at = &(*at)->next) {
    if (*at != work) continue;
    *at = work->next;
    if (lane->last == work) lane->last = previous;
    work->queued = NULL;
    if (!lane->first) lane_forget(link, lane);
    return;
  }
}

void link_reply(struct link *link, const struct packet *p) {
  link_activate(link);
  if (!link->outbox && !link->out->gave_up && link_room(link)) {
    *link_next(link) = *p;
    link_push(link);
    return;
  }
  struct outbox *entry = aligned_alloc(_Alignof(struct outbox), sizeof *entry); /* packets are: malloc aligns less */
  if (!entry) nic_end_for_memory("an answer to a peer");
  *entry = (struct outbox){ NULL, *p };
  *link->outbox_end = entry;
  link->outbox_end = &entry->next;
}

static bool still_busy(const struct busy *b) {
  struct endpoint *e = endpoint_find(b->index, b->serial);
  struct connection *c = e ? connection_of(e, b->slot) : NULL;
  return c && c->generation == b->generation && c->state == CONNECTION_BUSY;
}

void link_wait_busy(struct link *link, struct endpoint *e, uint32_t slot) {
  if (link->busy_count == link->busy_size) { /* those that were closed while they waited make room */
    uint32_t kept = 0, size = link->busy_size ? link->busy_size : 8;
    for (uint32_t i = 0; i < link->busy_count; i++)
      if (still_busy(&link->busy[i])) link->busy[kept++] = link->busy[i];
    link->busy_count = kept;
    if (kept >= size / 2 || !link->busy) size *= 2;
    struct busy *busy = realloc(link->busy, size * sizeof *busy);
    if (!busy) {
      connection_fail(e, slot, ETIMEDOUT);
      return;
    }
    link->busy = busy;
    link->busy_size = size;
  }
  link->busy[link->busy_count++] = (struct busy){ e->index, e->serial, slot, connection_of(e, slot)->generation };
}

static void link_retry(struct link *link, uint32_t flags) {
  uint32_t count = link->busy_count;
  link->busy_count = 0;
  for (uint32_t i = 0; i < count; i++) {
    if (!still_busy(&link->busy[i])) continue;
    struct endpoint *e = endpoint_find(link->busy[i].index, link->busy[i].serial);
    struct connection *c = connection_of(e, link->busy[i].slot);
    c->flags = (c->flags & ~(uint32_t)SAID_CONNECT) | flags;
    in_order();
    c->state = CONNECTION_CONNECTING;
    connection_enqueue(e, link->busy[i].slot);
  }
}

/* What the peer's predecessor may not have heard or answered is said again: all of it is idempotent. */
static void link_retell(struct link *link) {
  remotes_renew(link->node);
  log_event("info", "node%u has a new NIC: repeating what is unanswered", link->node);
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    for (uint32_t slot = 0; slot < e->own->active_end; slot++)
      if (e->own->connection[slot].far_node == link->node) connection_retell(e, slot);
    for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++)
      if (e->own->connection[slot].far_node == link->node) connection_retell(e, slot);
    command_retell(e, link->node);
  }
  link_retry(link, CONNECT_AGAIN);
}

/* The peer could not reach us for so long that it has given up all that was under way, answers included.  Our
 * programs hear of it what its programs did. */
static void link_given_up(struct link *link) {
  log_event("warning", "node%u had given this node up: connections with it end", link->node);
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    connections_given_up(e, link->node, ETIMEDOUT, true);
    command_retell(e, link->node);
  }
  link_retry(link, CONNECT_AGAIN);
  remotes_given_up(link->node);
}

void link_drop_answers(struct link *link) {
  for (struct outbox *entry; (entry = link->outbox); free(entry)) link->outbox = entry->next;
  link->outbox_end = &link->outbox;
  link->busy_count = 0;
}

static void dispatch(struct link *link, const struct packet *p) {
  COUNT_NODE(packets_received, 1);
  switch (p->type) {
    case PACKET_CONNECT: case PACKET_ACCEPTED: case PACKET_REFUSED: case PACKET_BUSY: case PACKET_DATA:
    case PACKET_CREDIT: case PACKET_FIN: case PACKET_CLOSE: case PACKET_RESET: case PACKET_CLOSED:
    case PACKET_RECALL: case PACKET_RECALLED:
      connection_packet(link, p);
      break;
    case PACKET_RETRY: link_retry(link, 0); break;
    case PACKET_IMPORT: export_answer(link, p); break;
    case PACKET_IMPORTED: case PACKET_SENT: case PACKET_FETCHED: command_packet(p); break;
    case PACKET_SEND: transfer_send_arrived(link, p); break;
    case PACKET_FETCH: transfer_fetch_arrived(link, p); break;
    case PACKET_NONE: case PACKET_PROBE: break;
    case PACKET_GIVEN_UP: link_given_up(link); break;
    case PACKET_GONE: remote_gone(link->node, p->from.serial); break;
    default: COUNT_NODE(packets_dropped, 1);
  }
}

static const struct packet *handled; /* in the sender's queue */
static uint8_t handled_type;

bool link_withdrawn(void) {
  /* acquire: the copy's reads before this look.  A sender that takes its word back empties the packet before its
   * program has the memory back, so a copy that met anything newer there finds the packet empty. */
  atomic_thread_fence(memory_order_acquire);
  return *(const volatile uint8_t *)&handled->type != handled_type;
}

void link_withdraw(uint32_t node, const struct packet_end *from) {
  struct link *link = nic.link[node];
  if (!link) return;
  uint64_t taken = taken_by_peer(link);
  for (uint64_t n = link->tail; n-- > taken;) { /* the newest first: what is left has no gap */
    struct packet *p = &link->out->packet[n % LINK_PACKETS];
    bool stream = p->type == PACKET_DATA || p->type == PACKET_FIN || p->type == PACKET_CLOSE;
    if (stream && !memcmp(&p->from, from, sizeof *from))
      *(volatile uint8_t *)&p->type = PACKET_NONE;
  }
  atomic_thread_fence(memory_order_seq_cst); /* before its memory is anybody else's */
}

void link_handle(struct link *link, const struct packet *p) {
  struct packet copy = *p; /* its sender may empty it meanwhile */
  if (link->taken < link->again && copy.type == PACKET_CONNECT) copy.flags |= PACKET_AGAIN;
  handled = &link->in->packet[link->taken % LINK_PACKETS];
  handled_type = copy.type;
  dispatch(link, &copy);
  in_order();
  link->taken++;
  /* release: all that the packet asked for is done and recorded, its place may be used again */
  atomic_store_explicit(&link->out->taken, link->taken, memory_order_release);
}

static int link_receive(struct link *link) {
  if (!link_opened(link)) return 0;
  /* acquire: the packets that it counts; and where some are a successor's, that there is one is seen next */
  uint64_t tail = atomic_load_explicit(&link->in->tail, memory_order_acquire);
  uint32_t incarnation = atomic_load(&link->pub->incarnation);
  if (incarnation != link->incarnation) {
    link->incarnation = incarnation;
    if (link->retransmit) retransmit_peer_is_new(link);
    link_retell(link);
  }
  uint32_t far_wire = atomic_load_explicit(&link->in->wire, memory_order_acquire);
  if (far_wire != link->far_wire) {
    link->far_wire = far_wire;
    retransmit_update(link, true);
  }
  if (link->retransmit) return retransmit_work(link);
  int done = 0;
  for (; link->taken < tail && done < RECEIVE_SHARE; done++)
    link_handle(link, &link->in->packet[link->taken % LINK_PACKETS]);
  if (done) {
    atomic_thread_fence(memory_order_seq_cst);
    uint64_t want = atomic_load_explicit(&link->in->want_room, memory_order_relaxed);
    if (link->taken >= want && link->taken - (uint64_t)done < want) link_ring(link);
  }
  if (link->taken < tail) link_look_again(link); /* more than its share: after the others */
  if (link->first || link->outbox || link->out->gave_up) link_activate(link); /* the peer may have made room */
  return done;
}

/*
 * Nodes that rang and to which no link could be made, for want of descriptors or memory: they do not ring again, so
 * it is tried again after a while.
 */
enum { MISSED_NS = 50000000 };
static uint64_t missed[VMMC_NODES_MAX / 64], missed_due_ns;

static void ring_missed(uint32_t node) {
  missed[node / 64] |= 1ull << node % 64;
  if (!missed_due_ns) missed_due_ns = vmmc_now_ns() + MISSED_NS;
}

static void look_at_missed(void) {
  if (!missed_due_ns || vmmc_now_ns() < missed_due_ns) return;
  missed_due_ns = 0;
  for (uint32_t word = 0; word < VMMC_NODES_MAX / 64; word++) {
    if (!missed[word]) continue;
    atomic_fetch_or(&nic.door->link[word], missed[word]);
    atomic_fetch_or(&nic.door->summary, 1ull << word);
    missed[word] = 0;
  }
}

uint64_t links_due(void) { return missed_due_ns ? missed_due_ns : UINT64_MAX; }

int links_receive(void) {
  int done = 0;
  look_at_missed();
  /* Plain look first: the exchange would take the cache line from whoever rings it. */
  if (!atomic_load_explicit(&nic.door->summary, memory_order_relaxed)) return 0;
  for (uint64_t summary = atomic_exchange(&nic.door->summary, 0); summary; summary &= summary - 1) {
    uint32_t word = (uint32_t)__builtin_ctzll(summary);
    if (word >= VMMC_NODES_MAX / 64) break;
    for (uint64_t bits = atomic_exchange(&nic.door->link[word], 0); bits; bits &= bits - 1) {
      uint32_t node = word * 64 + (uint32_t)__builtin_ctzll(bits);
      struct link *link = link_to(node);
      done++;
      if (link) done += link_receive(link);
      else if (errno != EHOSTUNREACH) ring_missed(node);
    }
  }
  return done;
}

static void link_flush_outbox(struct link *link) {
  if (link->out->gave_up && link_room(link)) {
    link_next(link)->type = PACKET_GIVEN_UP;
    link_push(link);
    in_order(); /* said twice it does no harm */
    link->out->gave_up = 0;
  }
  while (link->outbox && !link->out->gave_up && link_room(link)) {
    struct outbox *entry = link->outbox;
    *link_next(link) = entry->packet;
    link_push(link);
    link->outbox = entry->next;
    if (!link->outbox) link->outbox_end = &link->outbox;
    free(entry);
  }
}

/* Bytes that packets published since name. */
static uint64_t bytes_since(const struct link *link, uint64_t tail) {
  uint64_t bytes = 0;
  for (; tail != link->tail; tail++) bytes += link->out->packet[tail % LINK_PACKETS].length;
  return bytes;
}

/* The turn of one program: of one of its works.  Who sent more than a turn's share passes the next turns, unless
 * nobody else has anything to say. */
static void serve(struct link *link) {
  struct lane *lane = lane_dequeue(link);
  lane->ahead = link->first && lane->ahead > LANE_SHARE ? lane->ahead - LANE_SHARE : 0;
  if (!lane->ahead) {
    struct work *work = lane->first;
    uint64_t before = link->tail;
    lane->first = work->next;
    work->queued = NULL;
    link->serving = lane; /* it stands in the queue again below, also when more work has come meanwhile */
    if (work->transmit(work, link)) link_enqueue(link, work);
    link->serving = NULL;
    lane->ahead = bytes_since(link, before);
  }
  if (lane->first) lane_enqueue(link, lane);
}

/* Emits what there is room for.  True: something is left and there is room for it. */
static bool link_transmit(struct link *link, int *done) {
  uint64_t before = link->tail;
  link_flush_outbox(link);
  for (int share = 0; link->first && !link->outbox && !link->out->gave_up && link_room(link) && share < TRANSMIT_SHARE; share++) {
    serve(link);
    ++*done;
  }
  *done += (int)(link->tail - before);
  if (link->unrung) link_ring(link);
  if (!link->first && !link->outbox && !link->out->gave_up) {
    atomic_store_explicit(&link->out->want_room, UINT64_MAX, memory_order_relaxed);
    return false;
  }
  if (link_room(link)) return true;
  /* Full: ask to be rung when half of it is free, then look again (the peer takes first, then looks
   * at want_room). */
  atomic_store(&link->out->want_room, link->tail - LINK_PACKETS / 2);
  atomic_thread_fence(memory_order_seq_cst);
  return link_opened(link) && taken_by_peer(link) >= link->tail - LINK_PACKETS / 2;
}

int links_transmit(void) {
  int done = 0;
  struct link *list = nic.busy_links;
  nic.busy_links = NULL;
  while (list) {
    struct link *link = list;
    list = link->next_busy;
    link->in_busy_links = false;
    if (link_transmit(link, &done)) link_activate(link);
  }
  return done;
}

bool links_have_work(void) {
  if (atomic_load(&nic.door->summary)) return true;
  return nic.busy_links != NULL;
}

static bool queue_exists(uint32_t from, uint32_t to) {
  char what[32];
  snprintf(what, sizeof what, "link.node%u", to);
  struct link_queue *queue = segment_map(from, what, sizeof *queue, false, NULL);
  if (queue) munmap(queue, sizeof *queue);
  return queue != NULL;
}

void links_recover(void) {
  /* Every peer that has a queue to us, or we to it, hears of the new incarnation and looks.  (Not every peer:
   * that would make a queue for each.) */
  for (uint32_t node = 0; node < nic.nodes; node++) {
    if (!queue_exists(nic.node, node) && !queue_exists(node, nic.node)) continue;
    struct link *link = link_to(node);
    if (!link) continue;
    link_look_again(link);
    link->unrung = true;
    link_activate(link);
  }
}

/* ---- nodes that lose their power ---- */

static void link_end(struct link *link) {
  for (struct lane *lane = link->first; lane; lane = lane->next)
    for (struct work *w = lane->first; w; w = w->next) w->queued = NULL;
  link_drop_answers(link);
  if (link->retransmit) retransmit_end(link);
  for (struct link **at = &nic.busy_links; *at; at = &(*at)->next_busy) {
    if (*at != link) continue;
    *at = link->next_busy;
    break;
  }
  munmap(link->door, sizeof *link->door);
  munmap((void *)link->pub, sizeof *link->pub);
  if (link->in) munmap((void *)link->in, sizeof *link->in);
  munmap(link->out, sizeof *link->out);
  nic.link[link->node] = NULL;
  free(link->busy);
  free(link);
}

void link_lost(uint32_t node, uint32_t boot) {
  char what[32];
  if (node >= nic.nodes || node == nic.node) return;
  struct link *link = nic.link[node];
  if (boot <= nic.lost[node]) return;
  nic.lost[node] = boot;
  if (link && link->out->header.peer_boot > boot) return; /* found out by itself, and it is on again */
  log_event("warning", "node%u has lost its power: what there was with it ends", node);
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    connections_given_up(e, node, ETIMEDOUT, false);
    commands_given_up(e, node);
  }
  remotes_given_up(node);
  if (link) link_end(link);
  snprintf(what, sizeof what, "link.node%u", node);
  segment_end(nic.node, what);
  if (!queue_exists(node, nic.node)) return;
  /* On again, and it has rung before we knew. */
  atomic_fetch_or(&nic.door->link[node / 64], 1ull << node % 64);
  atomic_fetch_or(&nic.door->summary, 1ull << node / 64);
}

void links_lost_meanwhile(void) {
  for (uint32_t node = 0; node < nic.nodes; node++) {
    char what[32];
    if (node == nic.node || !queue_exists(nic.node, node)) continue;
    snprintf(what, sizeof what, "link.node%u", node);
    struct link_queue *out = segment_map(nic.node, what, sizeof *out, false, NULL);
    struct vmmc_pub *pub = segment_map(node, "pub", sizeof *pub, false, NULL);
    uint32_t spoke_to = out && out->header.magic == VMMC_MAGIC ? out->header.peer_boot : 0;
    uint32_t is = pub && pub->magic == VMMC_MAGIC ? pub->boot : 0;
    if (out) munmap(out, sizeof *out);
    if (pub) munmap(pub, sizeof *pub);
    if (spoke_to && spoke_to != is) link_lost(node, spoke_to);
  }
}

static const char *type_name(uint32_t type) {
  static const char *const name[] = {
    [PACKET_CONNECT] = "CONNECT",   [PACKET_ACCEPTED] = "ACCEPTED", [PACKET_REFUSED] = "REFUSED",
    [PACKET_BUSY] = "BUSY",         [PACKET_RETRY] = "RETRY",       [PACKET_DATA] = "DATA",
    [PACKET_CREDIT] = "CREDIT",     [PACKET_FIN] = "FIN",           [PACKET_CLOSE] = "CLOSE",
    [PACKET_RESET] = "RESET",       [PACKET_CLOSED] = "CLOSED",     [PACKET_RECALL] = "RECALL",
    [PACKET_RECALLED] = "RECALLED", [PACKET_IMPORT] = "IMPORT",     [PACKET_IMPORTED] = "IMPORTED",
    [PACKET_SEND] = "SEND",         [PACKET_SENT] = "SENT",         [PACKET_FETCH] = "FETCH",
    [PACKET_FETCHED] = "FETCHED",   [PACKET_GONE] = "GONE",         [PACKET_PROBE] = "PROBE",
    [PACKET_GIVEN_UP] = "GIVEN_UP",
  };
  return type < sizeof name / sizeof *name && name[type] ? name[type] : "unknown";
}

void links_report(void) {
  enum { NEWEST = 8 };
  for (uint32_t node = 0; node < nic.nodes; node++) {
    const struct link *link = nic.link[node];
    if (!link || !link->in) continue;
    crash_line("link with node%u: %llu packets taken of %llu, %llu sent", node, (unsigned long long)link->taken,
               (unsigned long long)atomic_load(&link->in->tail), (unsigned long long)link->tail);
    for (uint64_t i = link->taken > NEWEST ? link->taken - NEWEST : 0; i <= link->taken; i++) {
      const struct packet *p = &link->in->packet[i % LINK_PACKETS];
      if (p->sequence != i || p->type == PACKET_NONE) continue;
      crash_line("  packet %llu: type %s, flags %u, from serial %u slot %u, to serial %u slot %u, position %llu, length %u",
                 (unsigned long long)i, type_name(p->type), p->flags, p->from.serial, p->from.slot, p->to.serial, p->to.slot,
                 (unsigned long long)p->position, p->length);
    }
  }
}
