/*
 * port.c: the node's ports.  A binding is a socket's claim to one; the rules of who may share are
 * Linux's (SO_REUSEADDR, SO_REUSEPORT, wildcards, the two families).
 */
#include <netinet/in.h>
#include <string.h>

#include "nic.h"

enum { EPHEMERAL_FIRST = 32768, EPHEMERAL_LAST = 60999 }; /* Linux's default range */

static const uint8_t mapped_prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };

static bool is_ipv4(const struct vmmc_address *a) { return !memcmp(a->ip, mapped_prefix, 12); }

static bool is_any(const struct vmmc_address *a) {
  static const uint8_t zero[16];
  return is_ipv4(a) ? !memcmp(a->ip + 12, zero, 4) : !memcmp(a->ip, zero, 16);
}

/* Does a binding to `bound` take packets to `ip` (or, both wildcards, overlap with it)? */
static bool covers(const struct binding *b, const struct vmmc_address *to) {
  if (!memcmp(b->address.ip, to->ip, 16)) return true;
  if (!is_any(&b->address)) return false;
  if (is_ipv4(&b->address)) return is_ipv4(to);
  return !is_ipv4(to) || !(b->flags & VMMC_BIND_V6ONLY);
}

static bool overlap(const struct binding *a, const struct binding *b) {
  return covers(a, &b->address) || covers(b, &a->address);
}

/* Is `taken` in the way of a socket that wants to bind, or to listen? */
static bool conflict(const struct binding *wanted, const struct binding *taken) {
  if (wanted->address.port != taken->address.port || !overlap(wanted, taken)) return false;
  if (wanted->flags & taken->flags & VMMC_BIND_REUSEPORT) return false;
  return !(wanted->flags & taken->flags & VMMC_BIND_REUSEADDR) || taken->listening;
}

static uint32_t *bucket_of(uint16_t port) { return &nic.state->bucket[port % PORT_BUCKETS]; }

/* The program has closed the socket and the doorbell was not looked at yet: does so now.  A close and the
 * next bind ring for two slots, and are looked at in the order of the slots, not of the calls. */
static bool was_closed(const struct binding *b) {
  struct endpoint *e = nic.endpoint[b->endpoint];
  uint32_t slot = b->slot;
  if (!e || e->serial != b->serial || !(connection_half(e, slot).shut & VMMC_CLOSED)) return false;
  struct connection *c = connection_of(e, slot);
  if (c->state != CONNECTION_IDLE && c->state != CONNECTION_LISTENING) return false;
  connection_end(e, slot); /* not a look: it would serve a request, which may ask for a port again */
  return !c->binding;
}

/* Connections that were accepted at a port have a claim to it too, when their listener is gone.  That is counted,
 * and looked up when somebody wants such a port: which is seldom. */
static uint32_t accepted[UINT16_MAX + 1];

void port_accepted(const struct connection *c) { accepted[c->local.port]++; }
void port_left(const struct connection *c) { accepted[c->local.port]--; }

static bool conflicts_with_accepted(const struct binding *candidate) {
  if (!accepted[candidate->address.port]) return false;
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++) {
      const struct connection *c = connection_of(e, slot);
      struct binding taken = { .flags = c->bind_flags, .address = c->local };
      if (conflict(candidate, &taken) && connection_holds_port(e, slot)) return true;
    }
  }
  return false;
}

static bool conflicts(const struct binding *candidate, uint32_t except) {
  uint32_t *at = bucket_of(candidate->address.port);
  while (*at) {
    struct binding *b = &nic.state->binding[*at - 1];
    if (*at == except || !conflict(candidate, b)) at = &b->next;
    else if (was_closed(b)) at = bucket_of(candidate->address.port); /* the list has changed */
    else return true;
  }
  return conflicts_with_accepted(candidate);
}

/* How many bindings a port has, so that looking for a free one costs the same however many are taken. */
static uint32_t claims[UINT16_MAX + 1];

/* Enters a binding, which counts once the connection refers to it.  0: no room, in the table or in memory. */
static uint32_t enter(struct endpoint *e, uint32_t slot, const struct binding *candidate) {
  struct node_state *s = nic.state;
  uint32_t i = s->free_binding;
  if (i) {
    s->free_binding = s->binding[i - 1].next;
  } else {
    uint32_t end = s->bindings_end;
    if (end == BINDINGS) return 0;
    if (end % BINDINGS_STEP == 0 && !segment_commit(nic.state_fd, offsetof(struct node_state, binding) + end * sizeof *s->binding,
                                                    BINDINGS_STEP * sizeof *s->binding))
      return 0;
    i = ++s->bindings_end;
  }
  struct binding *b = &s->binding[i - 1];
  *b = *candidate;
  b->used = 1;
  b->endpoint = e->index;
  b->serial = e->serial;
  b->slot = slot;
  b->generation = connection_of(e, slot)->generation;
  b->next = *bucket_of(b->address.port);
  *bucket_of(b->address.port) = i;
  claims[b->address.port]++;
  in_order();
  return i;
}

static uint16_t choose_port(void) {
  uint32_t range = EPHEMERAL_LAST - EPHEMERAL_FIRST + 1;
  for (uint32_t tries = 0; tries < range; tries++) {
    uint16_t port = (uint16_t)(EPHEMERAL_FIRST + nic.state->next_ephemeral++ % range);
    if (!claims[port] && !accepted[port]) return port;
  }
  return 0;
}

int port_bind(struct endpoint *e, uint32_t slot, struct vmmc_address *address, uint32_t flags, uint32_t request) {
  struct connection *c = connection_of(e, slot);
  if (c->binding) {
    if (c->asked != request) return EINVAL; /* bound already */
    *address = nic.state->binding[c->binding - 1].address; /* by a NIC that died before it answered */
    return 0;
  }
  c->asked = request;
  struct binding candidate = { .flags = flags, .address = *address };
  if (!candidate.address.port && !(candidate.address.port = choose_port())) return EADDRINUSE;
  if (conflicts(&candidate, 0)) return EADDRINUSE;
  if (!(c->binding = enter(e, slot, &candidate))) return ENOBUFS;
  address->port = candidate.address.port;
  return 0;
}

int port_ephemeral(struct endpoint *e, uint32_t slot, struct vmmc_address *address, uint32_t flags) {
  struct connection *c = connection_of(e, slot);
  if (c->binding) {
    address->port = nic.state->binding[c->binding - 1].address.port;
    return 0;
  }
  struct binding candidate = { .flags = flags, .address = *address };
  if (!(candidate.address.port = choose_port())) return EADDRNOTAVAIL;
  if (!(c->binding = enter(e, slot, &candidate))) return ENOBUFS;
  address->port = candidate.address.port;
  return 0;
}

int port_listen(struct endpoint *e, uint32_t slot) {
  struct connection *c = connection_of(e, slot);
  struct binding *b = &nic.state->binding[c->binding - 1];
  struct binding candidate = *b;
  candidate.listening = 1;
  if (conflicts(&candidate, c->binding)) return EADDRINUSE;
  b->listening = 1;
  return 0;
}

void port_release(struct connection *c) {
  if (!c->binding) return;
  struct binding *b = &nic.state->binding[c->binding - 1];
  if (b->listening) port_unwelcome(b->address.port);
  for (uint32_t *at = bucket_of(b->address.port); *at; at = &nic.state->binding[*at - 1].next) {
    if (*at != c->binding) continue;
    *at = b->next;
    claims[b->address.port]--;
    b->used = 0;
    b->next = nic.state->free_binding;
    nic.state->free_binding = c->binding;
    break;
  }
  c->binding = 0;
}

static bool listens(const struct binding *b, const struct vmmc_address *to) {
  return b->listening && b->address.port == to->port && covers(b, to);
}

static bool is_exactly(const struct binding *b, const struct vmmc_address *to) {
  return !memcmp(b->address.ip, to->ip, 16);
}

struct binding *port_listener(const struct vmmc_address *to) {
  uint32_t exact = 0, wild = 0;
  for (uint32_t i = *bucket_of(to->port); i; i = nic.state->binding[i - 1].next) {
    const struct binding *b = &nic.state->binding[i - 1];
    if (!listens(b, to)) continue;
    if (is_exactly(b, to)) exact++;
    else wild++;
  }
  if (!exact && !wild) return NULL;
  /* An exact address goes before any wildcard.  SO_REUSEPORT: several share the port, in turn. */
  uint32_t turn = nic.state->round_robin++ % (exact ? exact : wild);
  for (uint32_t i = *bucket_of(to->port);; i = nic.state->binding[i - 1].next) {
    struct binding *b = &nic.state->binding[i - 1];
    if (listens(b, to) && (!exact || is_exactly(b, to)) && !turn--) return b;
  }
}

/* ---- what peers may count on ---- */

/*
 * A NIC publishes at which addresses it has accepted lately and how many more connections the listener has room for.
 * Where the wire is perfect a peer's NIC tells its program by that that it is connected while CONNECT is still on its
 * way, as the kernel of a TCP client does when nobody has called accept yet: two hops of four less to wait for.  Each
 * node counts on a quarter of the room at most, so that others find some as well.  Should it be gone all the same,
 * the connection waits for room like any other, and if the listener is gone, it is reset.
 */
enum { WELCOME_ROOM_MAX = UINT16_MAX, WELCOME_SHARE = 4 };

static uint64_t welcome_key(const struct vmmc_address *to) {
  uint64_t part[2];
  memcpy(part, to->ip, sizeof part);
  uint64_t mixed = (part[0] ^ part[1] * 0x9e3779b97f4a7c15u) * 0xff51afd7ed558ccdu; /* odd, and bits well spread */
  return (mixed >> 32) << 32 | (uint64_t)to->port << 16;
}

/* relaxed, here and below: an entry is one word that speaks for itself.  Who was told that the listener is gone (the
 * release of its slot's state, in finish(), and whatever led from there to a peer) finds its entry gone too. */
void port_welcome(const struct vmmc_address *to, uint64_t room) {
  uint64_t entry = welcome_key(to) | (room < WELCOME_ROOM_MAX ? room : WELCOME_ROOM_MAX);
  atomic_store_explicit(&nic.pub->welcome[to->port % VMMC_WELCOMES], entry, memory_order_relaxed);
}

void port_unwelcome(uint16_t port) {
  atomic_store_explicit(&nic.pub->welcome[port % VMMC_WELCOMES], 0, memory_order_relaxed);
}

uint32_t port_welcomes(const struct vmmc_pub *peer, const struct vmmc_address *to) {
  uint64_t entry = atomic_load_explicit(&peer->welcome[to->port % VMMC_WELCOMES], memory_order_relaxed);
  return entry >> 16 == welcome_key(to) >> 16 ? (uint32_t)(entry & WELCOME_ROOM_MAX) / WELCOME_SHARE : 0;
}

/* Buckets and the free list are made anew from the bindings that a connection refers to: the predecessor may
 * have been killed while it changed them. */
void ports_recover(void) {
  struct node_state *s = nic.state;
  memset(s->bucket, 0, sizeof s->bucket);
  memset(claims, 0, sizeof claims);
  memset(accepted, 0, sizeof accepted);
  for (uint32_t i = 0; i < VMMC_WELCOMES; i++) /* who died may have been about to take some back */
    atomic_store_explicit(&nic.pub->welcome[i], 0, memory_order_relaxed);
  for (uint32_t i = 0; i < nic.live_count; i++) {
    struct endpoint *e = nic.endpoint[nic.live[i]];
    for (uint32_t slot = VMMC_ACTIVE_SLOTS; slot < e->own->passive_end; slot++)
      if (connection_of(e, slot)->state != CONNECTION_NONE) port_accepted(connection_of(e, slot));
  }
  s->free_binding = 0;
  for (uint32_t i = s->bindings_end; i; i--) {
    struct binding *b = &s->binding[i - 1];
    struct endpoint *e = endpoint_find(b->endpoint, b->serial);
    struct connection *c = e && b->slot < VMMC_SLOTS ? connection_of(e, b->slot) : NULL;
    b->used = c && c->state != CONNECTION_NONE && c->generation == b->generation && c->binding == i;
    claims[b->address.port] += b->used;
    uint32_t *head = b->used ? bucket_of(b->address.port) : &s->free_binding;
    b->next = *head;
    *head = i;
  }
}
