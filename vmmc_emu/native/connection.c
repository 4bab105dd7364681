/*
 * connection.c: a socket's life: its slot, bind, listen, accept, connect, close.
 *
 * A socket is made without anything in shared memory.  bind, listen and connect take an active slot;
 * accept adopts the passive slot that the NIC filled.  The last reference gives the slot back: the NIC
 * delivers what was written, ends the connection and says VMMC_FREE, after which the slot is used again.
 *
 * Sockets lie in a pool whose memory is never unmapped, so that a stale pointer to one (from the event
 * ring, from a thread that lost a race with close) can always be read, and its references looked at.
 */
#include "connection.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "address.h"
#include "sys.h"

enum {
  POOL_CHUNK = 64 * 1024,
  REAP_LOOKS = 8,     /* closed slots that are looked at when one is needed */
  BACKLOG_MAX = 4096, /* net.core.somaxconn */
  SLOTS_PER_PAGE = VMMC_PAGE / sizeof(struct vmmc_app_slot),
};

/* ---- the pool of sockets ---- */

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vsocket *pool_free;
static _Atomic uint32_t forks; /* of this process, so far */

/* Called with pool_lock held. */
static bool pool_grow(void) {
  char *chunk = mmap(NULL, POOL_CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (chunk == MAP_FAILED) return false;
  for (size_t at = 0; at + sizeof(struct vsocket) <= POOL_CHUNK; at += sizeof(struct vsocket)) {
    struct vsocket *s = (struct vsocket *)(chunk + at);
    /* Once for the memory's life: a stale pointer may still meet these locks. */
    pthread_mutex_init(&s->send_lock, NULL);
    pthread_mutex_init(&s->receive_lock, NULL);
    pthread_mutex_init(&s->control_lock, NULL);
    s->next_free = pool_free;
    pool_free = s;
  }
  return true;
}

static void before_fork(void);
static void after_fork(void);
static void after_fork_in_parent(void);

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork); }

struct vsocket *socket_new(int family) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  pthread_mutex_lock(&pool_lock);
  struct vsocket *s = pool_free || pool_grow() ? pool_free : NULL;
  if (s) pool_free = s->next_free;
  pthread_mutex_unlock(&pool_lock);
  if (!s) return NULL;

  s->next_free = NULL;
  s->family = family;
  s->endpoint = NULL;
  s->slot = s->generation = 0;
  s->receive_timeout_ns = s->send_timeout_ns = 0;
  s->receive_buffer = s->send_buffer = 0;
  s->linger_s = -1;
  s->forks = atomic_load_explicit(&forks, memory_order_relaxed);
  s->bind_flags = s->flags = 0;
  s->error = 0;
  s->error_taken = 0;
  s->watch = 0;
  s->readiness = NULL;
  memset(&s->local, 0, sizeof s->local);
  memset(&s->peer, 0, sizeof s->peer);
  s->bound = s->control_busy = s->redirecting = false;
  s->closing = s->ended = s->shut = s->local_asleep = 0;
  s->request = 0;
  s->low_water = 1;
  s->rung = s->outstanding = s->full_at = 0;
  memset(s->kept, 0, sizeof s->kept);
  s->phase = SOCKET_NEW;
  /* release: socket_of_slot may look at the references of a socket that it found stale */
  atomic_store_explicit(&s->references, 1, memory_order_release);
  return s;
}

void socket_hold(struct vsocket *s) { atomic_fetch_add_explicit(&s->references, 1, memory_order_relaxed); }

/* A reference, unless nobody has one any more. */
static bool try_hold(struct vsocket *s) {
  uint32_t n = atomic_load_explicit(&s->references, memory_order_relaxed);
  while (n)
    if (atomic_compare_exchange_weak_explicit(&s->references, &n, n + 1, memory_order_acquire, memory_order_relaxed))
      return true;
  return false;
}

/* ---- slots ---- */

struct closed_slot {
  uint32_t slot, generation;
};

/* An endpoint's slots.  Private memory, zero where never used; everything under `lock` but memory[]. */
struct slots {
  pthread_mutex_t lock;
  uint32_t fresh;                              /* active slots below this were used before */
  uint32_t free_count;                         /* of free[], last freed first */
  uint32_t closed_head, closed_count;          /* of closed[], a ring */
  uint64_t spare_bytes;                        /* ring bytes that slots out of use keep */
  uint16_t free[VMMC_ACTIVE_SLOTS];
  uint8_t page_committed[VMMC_SLOTS / SLOTS_PER_PAGE];
  struct closed_slot closed[VMMC_SLOTS];       /* given back, not yet seen VMMC_FREE */
  struct slot_memory memory[VMMC_SLOTS];
};

static pthread_mutex_t slots_making = PTHREAD_MUTEX_INITIALIZER;

static struct slots *slots_of(struct endpoint *e) {
  /* acquire: pairs with the release below */
  return atomic_load_explicit((_Atomic(void *) *)&e->sockets, memory_order_acquire);
}

static struct slots *slots_make(struct endpoint *e) {
  struct slots *made = slots_of(e);
  if (made) return made;
  pthread_mutex_lock(&slots_making);
  made = slots_of(e);
  if (!made) {
    made = mmap(NULL, sizeof *made, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) {
      made = NULL;
    } else {
      pthread_mutex_init(&made->lock, NULL);
      atomic_store_explicit((_Atomic(void *) *)&e->sockets, made, memory_order_release);
    }
  }
  pthread_mutex_unlock(&slots_making);
  return made;
}

struct slot_memory *slot_memory(struct endpoint *e, uint32_t slot) { return &slots_of(e)->memory[slot]; }

/* A fork must find these locks free: its child may open sockets of its own. */
static void before_fork(void) {
  pthread_mutex_lock(&slots_making);
  pthread_mutex_lock(&pool_lock);
}

static void after_fork(void) {
  pthread_mutex_unlock(&pool_lock);
  pthread_mutex_unlock(&slots_making);
}

static void after_fork_in_parent(void) {
  atomic_fetch_add_explicit(&forks, 1, memory_order_relaxed);
  after_fork();
}

/* Both halves of a slot lie in pages that are there.  Called with the lock held. 0 or -ENOBUFS. */
static int commit_slot(struct endpoint *e, struct slots *slots, uint32_t slot) {
  uint8_t *committed = &slots->page_committed[slot / SLOTS_PER_PAGE];
  if (*committed) return 0;
  int error = endpoint_commit(app_slot(e, slot), sizeof(struct vmmc_app_slot), true);
  if (!error) error = endpoint_commit(nic_slot(e, slot), sizeof(struct vmmc_nic_slot), false);
  if (!error) *committed = 1;
  return error;
}

/* The slot is out of use: its ring's pages wait for the next user, or go back when many wait. */
static void keep_or_return_ring(struct endpoint *e, struct slots *slots, uint32_t slot) {
  struct slot_memory *memory = &slots->memory[slot];
  if (!memory->committed) return;
  if (slots->spare_bytes + memory->committed > SPARE_RINGS_BYTES &&
      madvise(transmit_ring(e, slot), VMMC_RING, MADV_REMOVE) == 0) {
    memory->committed = 0;
    return;
  }
  memory->spare = true;
  slots->spare_bytes += memory->committed;
}

static void take_ring(struct slots *slots, uint32_t slot) {
  struct slot_memory *memory = &slots->memory[slot];
  if (!memory->spare) return;
  memory->spare = false;
  slots->spare_bytes -= memory->committed;
}

/* Looks at a few slots that were given back: has the NIC done with them?  In turn, so that one which
 * lingers does not hide those behind it.  Called with the lock held. */
static void reap(struct endpoint *e, struct slots *slots) {
  uint32_t looks = slots->closed_count < REAP_LOOKS ? slots->closed_count : REAP_LOOKS;
  for (; looks; looks--) {
    struct closed_slot entry = slots->closed[slots->closed_head];
    slots->closed_head = (slots->closed_head + 1) % VMMC_SLOTS;
    slots->closed_count--;
    struct slot_memory *memory = &slots->memory[entry.slot];
    if (memory->generation != entry.generation) continue; /* a passive one that was accepted into again */
    const struct vmmc_nic_slot *n = nic_slot(e, entry.slot);
    bool active = entry.slot < VMMC_ACTIVE_SLOTS;
    /* The state first (acquire pairs with the NIC's release): a passive slot moves on by itself. */
    bool free = atomic_load_explicit(&n->state, memory_order_acquire) == VMMC_FREE;
    bool same = atomic_load_explicit(&n->generation, memory_order_acquire) == entry.generation;
    if (active ? free && same : free || !same) {
      keep_or_return_ring(e, slots, entry.slot);
      if (active) slots->free[slots->free_count++] = (uint16_t)entry.slot;
    } else {
      slots->closed[(slots->closed_head + slots->closed_count++) % VMMC_SLOTS] = entry;
    }
  }
}

/* Our half of a slot, empty; `generation` last, which makes it count. */
static void fill_slot(struct vsocket *s, struct endpoint *e, uint32_t slot, uint32_t generation) {
  struct vmmc_app_slot *a = app_slot(e, slot);
  atomic_store_explicit(&a->written, 0, memory_order_relaxed);
  atomic_store_explicit(&a->shut, 0, memory_order_relaxed);
  atomic_store_explicit(&a->asleep_tx, 0, memory_order_relaxed);
  atomic_store_explicit(&a->consumed, 0, memory_order_relaxed);
  atomic_store_explicit(&a->asleep_rx, 0, memory_order_relaxed);
  atomic_store_explicit(&a->post, 0, memory_order_relaxed);
  atomic_store_explicit(&a->receive_window, s->receive_buffer, memory_order_relaxed);
  s->endpoint = e;
  s->slot = slot;
  s->request = atomic_load_explicit(&a->request, memory_order_relaxed); /* counts on from its last user */
  s->rung = s->outstanding = 0;
  s->full_at = 0;
  s->error_taken = 0;
  struct slot_memory *memory = slot_memory(e, slot);
  memory->generation = generation;
  atomic_store_explicit(&memory->socket, s, memory_order_release);
  /* release: the NIC that sees the generation sees the rest */
  atomic_store_explicit(&a->generation, generation, memory_order_release);
  s->generation = generation;
  atomic_store(&a->watch, atomic_load(&s->watch));
}

/* Takes an active slot.  Called by the one thread that has the control of s. 0 or -errno. */
static int take_slot(struct vsocket *s) {
  if (s->generation) return 0;
  struct endpoint *e = endpoint_default();
  if (!e) return -errno;
  struct slots *slots = slots_make(e);
  if (!slots) return -ENOMEM;
  pthread_mutex_lock(&slots->lock);
  reap(e, slots);
  int error = 0;
  uint32_t slot = 0, generation = 0;
  if (!slots->free_count && slots->fresh == VMMC_ACTIVE_SLOTS) {
    error = -ENOBUFS;
  } else {
    slot = slots->free_count ? slots->free[slots->free_count - 1] : slots->fresh;
    error = commit_slot(e, slots, slot);
  }
  if (!error) {
    if (slots->free_count)
      slots->free_count--;
    else
      slots->fresh++;
    take_ring(slots, slot);
    generation = slots->memory[slot].generation + 1;
    if (!generation) generation = 1;
  }
  pthread_mutex_unlock(&slots->lock);
  if (!error) fill_slot(s, e, slot, generation);
  return error;
}

/* The slot goes back to the NIC.  Nobody uses it through s any more. */
static void give_slot_back(struct vsocket *s) {
  struct slots *slots = slots_of(s->endpoint);
  atomic_store_explicit(&slots->memory[s->slot].socket, NULL, memory_order_release);
  pthread_mutex_lock(&slots->lock);
  /* A passive slot waits here only for its ring's pages, and may stand here several times: it never takes
   * the room that the active ones need. */
  if (s->slot < VMMC_ACTIVE_SLOTS || slots->closed_count < VMMC_SLOTS - VMMC_ACTIVE_SLOTS)
    slots->closed[(slots->closed_head + slots->closed_count++) % VMMC_SLOTS] =
        (struct closed_slot){ s->slot, s->generation };
  reap(s->endpoint, slots);
  pthread_mutex_unlock(&slots->lock);
}

struct vsocket *socket_of_slot(struct endpoint *e, uint32_t slot) {
  struct slots *slots = slots_of(e);
  if (!slots || slot >= VMMC_SLOTS) return NULL;
  _Atomic(struct vsocket *) *place = &slots->memory[slot].socket;
  struct vsocket *s = atomic_load_explicit(place, memory_order_acquire);
  if (!s || !try_hold(s)) return NULL;
  /* Between the look and the hold it may have become another socket: then it is not there any more. */
  if (atomic_load_explicit(place, memory_order_acquire) == s) return s;
  socket_release(s);
  return NULL;
}

/* ---- where a connection stands ---- */

struct connection_view connection_view(const struct vsocket *s) {
  struct connection_view view = { 0 };
  uint32_t phase = atomic_load_explicit(&s->phase, memory_order_acquire);
  if (phase != SOCKET_CONNECTING && phase != SOCKET_CONNECTED) return view;
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  /* acquire: what the status speaks of was stored before it */
  view.status = atomic_load_explicit(&n->status, memory_order_acquire);
  /* A passive slot's half is the NIC's before it is ours; an active one's is still the last user's until
   * the NIC has looked. */
  if (phase == SOCKET_CONNECTING && atomic_load_explicit(&n->generation, memory_order_acquire) != s->generation)
    view.status = 0;
  view.connected = phase == SOCKET_CONNECTED || (view.status & VMMC_CONNECTED);
  view.dead = view.status & VMMC_ERRNO_MASK;
  view.connecting = !view.connected && !view.dead;
  return view;
}

int connection_pending_error(struct vsocket *s) {
  int error = atomic_load_explicit(&s->error, memory_order_relaxed);
  if (error || atomic_load_explicit(&s->error_taken, memory_order_relaxed)) return error;
  return (int)(connection_view(s).status & VMMC_ERRNO_MASK);
}

int connection_take_error(struct vsocket *s) {
  int error = atomic_exchange(&s->error, 0);
  if (error) {
    atomic_store(&s->error_taken, 1);
    return error;
  }
  error = (int)(connection_view(s).status & VMMC_ERRNO_MASK);
  return error && !atomic_exchange(&s->error_taken, 1) ? error : 0;
}

bool socket_wait_words(struct vsocket *s, struct wait_word *receive, struct wait_word *send) {
  if (!s->generation || !connection_usable(s)) return false;
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  *receive = (struct wait_word){ &n->wake_rx, &a->asleep_rx };
  *send = (struct wait_word){ &n->wake_tx, &a->asleep_tx };
  return true;
}

int connection_words(struct vsocket *s, bool receive, struct wait_word words[CONNECTION_WORDS]) {
  struct wait_word rx, tx;
  int count = 0;
  if (socket_wait_words(s, &rx, &tx)) words[count++] = receive ? rx : tx;
  words[count++] = (struct wait_word){ &s->local_wake, &s->local_asleep };
  return count;
}

void connection_wake_local(struct vsocket *s) {
  /* seq_cst against the sleeper's announcement: see wait.c */
  atomic_fetch_add(&s->local_wake, 1);
  if (atomic_load(&s->local_asleep)) sys_call(SYS_futex, (long)&s->local_wake, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}

uint64_t connection_deadline(uint64_t timeout_ns) {
  return timeout_ns ? vmmc_now_ns() + timeout_ns : WAIT_FOREVER;
}

/* ---- requests to the NIC ---- */

/*
 * Control: one bind, listen or connect at a time has the slot's mailbox, from before it looks at the
 * phase until the NIC answered.  That is a flag and not the lock, since a lock is not held while asleep.
 */
static bool control_is_free(void *context) {
  struct vsocket *s = context;
  pthread_mutex_lock(&s->control_lock);
  bool free = !s->control_busy;
  pthread_mutex_unlock(&s->control_lock);
  return free;
}

static void control_begin(struct vsocket *s) {
  struct wait_word word = { &s->local_wake, &s->local_asleep };
  for (;;) {
    pthread_mutex_lock(&s->control_lock);
    bool mine = !s->control_busy;
    s->control_busy = true;
    pthread_mutex_unlock(&s->control_lock);
    if (mine) return;
    wait_until(&word, 1, control_is_free, s, WAIT_FOREVER, false); /* a signal does not end it */
  }
}

static void control_end(struct vsocket *s) {
  pthread_mutex_lock(&s->control_lock);
  s->control_busy = false;
  pthread_mutex_unlock(&s->control_lock);
  connection_wake_local(s);
}

static void post_request(struct vsocket *s, uint32_t op, const struct vmmc_address *local,
                         const struct vmmc_address *peer, uint32_t node, int backlog) {
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  a->op = op;
  a->bind_flags = (uint16_t)s->bind_flags;
  a->local = *local;
  if (peer) a->peer = *peer;
  a->peer_node = (uint16_t)node;
  a->backlog = (uint32_t)backlog;
  /* release: the NIC that sees the request sees what it asks */
  atomic_store_explicit(&a->request, ++s->request, memory_order_release);
  endpoint_ring_slot(s->endpoint, s->slot);
}

static bool answered(void *context) {
  struct vsocket *s = context;
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  return atomic_load_explicit(&n->generation, memory_order_acquire) == s->generation &&
         atomic_load_explicit(&n->reply, memory_order_acquire) == s->request;
}

/* Waits for the answer to the newest request, whatever signals come.  0 or -errno. */
static int await_answer(struct vsocket *s) {
  struct wait_word words[CONNECTION_WORDS];
  int count = connection_words(s, false, words), cancel;
  /* bind and listen are no cancellation points, and connect's is the wait for its outcome */
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
  while (wait_until(words, count, answered, s, WAIT_FOREVER, false)) {
  }
  pthread_setcancelstate(cancel, NULL);
  return -nic_slot(s->endpoint, s->slot)->reply_error;
}

static void learn_addresses(struct vsocket *s) {
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  s->local = n->local;
  s->peer = n->peer;
}

/* ---- bind and listen ---- */

static struct vmmc_address wildcard(int family) {
  struct vmmc_address any = { .family = (uint16_t)family };
  if (family == AF_INET) any.ip[10] = any.ip[11] = 0xff;
  return any;
}

static int bind_slot(struct vsocket *s, const struct vmmc_address *local) {
  int error = take_slot(s);
  if (error) return error;
  post_request(s, VMMC_REQUEST_BIND, local, NULL, 0, 0);
  error = await_answer(s);
  if (error) return error;
  s->local = nic_slot(s->endpoint, s->slot)->local;
  s->bound = true;
  atomic_store_explicit(&s->phase, SOCKET_BOUND, memory_order_release);
  return 0;
}

int socket_bind(struct vsocket *s, const struct sockaddr *address, socklen_t length) {
  struct vmmc_address local;
  int error = address_read(address, length, s->family, &local);
  if (error == -EAFNOSUPPORT && s->family == AF_INET) {
    /* Linux takes AF_UNSPEC for AF_INET when the address is the wildcard. */
    struct sockaddr_in in;
    memcpy(&in, address, sizeof in);
    if (in.sin_family == AF_UNSPEC && in.sin_addr.s_addr == 0) {
      local = wildcard(AF_INET);
      local.port = ntohs(in.sin_port);
      error = 0;
    }
  }
  if (error) return error;
  if (!connection_usable(s)) return -EBADF;
  if (!address_is_local(&local)) return -EADDRNOTAVAIL;
  if ((s->bind_flags & VMMC_BIND_V6ONLY) && address_is_v4(&local)) return -EINVAL;
  control_begin(s);
  if (atomic_load(&s->phase) != SOCKET_NEW || s->bound)
    error = -EINVAL;
  else
    error = bind_slot(s, &local);
  control_end(s);
  return error;
}

static int listen_slot(struct vsocket *s, int backlog) {
  int error = take_slot(s);
  if (error) return error;
  struct vmmc_address local = s->bound ? s->local : wildcard(s->family);
  post_request(s, VMMC_REQUEST_LISTEN, &local, NULL, 0, backlog);
  error = await_answer(s);
  if (error) return error;
  s->local = nic_slot(s->endpoint, s->slot)->local;
  atomic_store_explicit(&s->phase, SOCKET_LISTENING, memory_order_release);
  return 0;
}

int socket_listen(struct vsocket *s, int backlog) {
  if (!connection_usable(s)) return -EBADF;
  if (backlog < 0 || backlog > BACKLOG_MAX) backlog = BACKLOG_MAX; /* unsigned, as Linux takes it */
  control_begin(s);
  uint32_t phase = atomic_load(&s->phase);
  int error = phase == SOCKET_CONNECTING || phase == SOCKET_CONNECTED ? -EINVAL : listen_slot(s, backlog);
  control_end(s);
  return error;
}

/* ---- accept ---- */

uint64_t connection_accepts_waiting(const struct vsocket *s) {
  /* acquire: an entry lies in the buffer before `placed` counts it */
  return atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->placed, memory_order_acquire) -
         atomic_load_explicit(&app_slot(s->endpoint, s->slot)->consumed, memory_order_relaxed);
}

static bool can_accept(void *context) {
  struct vsocket *s = context;
  return atomic_load_explicit(&s->phase, memory_order_acquire) != SOCKET_LISTENING ||
         connection_accepts_waiting(s) >= sizeof(struct vmmc_accept_entry);
}

/* What an accepted socket has from its listener, as on Linux. */
static void inherit(struct vsocket *s, const struct vsocket *listener) {
  s->receive_timeout_ns = listener->receive_timeout_ns;
  s->send_timeout_ns = listener->send_timeout_ns;
  s->receive_buffer = listener->receive_buffer;
  s->send_buffer = listener->send_buffer;
  s->linger_s = listener->linger_s;
  s->bind_flags = listener->bind_flags;
  s->flags = listener->flags;
  s->low_water = listener->low_water;
  memcpy(s->kept, listener->kept, sizeof s->kept);
}

/* Takes the first waiting connection into `accepted`.  -EAGAIN: none waits.  receive_lock is held. */
static int accept_one(struct vsocket *s, struct vsocket *accepted) {
  struct endpoint *e = s->endpoint;
  struct slots *slots = slots_of(e);
  struct vmmc_app_slot *a = app_slot(e, s->slot);
  for (;;) {
    if (atomic_load(&s->phase) != SOCKET_LISTENING) return -EINVAL;
    if (connection_accepts_waiting(s) < sizeof(struct vmmc_accept_entry)) return -EAGAIN;
    uint64_t consumed = atomic_load_explicit(&a->consumed, memory_order_relaxed);
    struct vmmc_accept_entry entry;
    memcpy(&entry, default_buffer(e, s->slot) + consumed % VMMC_RING, sizeof entry);
    if (entry.slot >= VMMC_ACTIVE_SLOTS && entry.slot < VMMC_SLOTS) {
      pthread_mutex_lock(&slots->lock);
      reap(e, slots);
      int error = commit_slot(e, slots, entry.slot);
      if (!error) {
        take_ring(slots, entry.slot);
        slots->memory[entry.slot].generation = entry.generation;
      }
      pthread_mutex_unlock(&slots->lock);
      if (error) return error; /* it goes on waiting */
      fill_slot(accepted, e, entry.slot, entry.generation);
      learn_addresses(accepted);
      atomic_store_explicit(&accepted->phase, SOCKET_CONNECTED, memory_order_release);
      endpoint_ring_slot(e, entry.slot);
    }
    /* release: the entry was read before the NIC may reuse its place */
    atomic_store_explicit(&a->consumed, consumed + sizeof entry, memory_order_release);
    endpoint_ring_slot(e, s->slot); /* the backlog has room: others may be waiting for it */
    if (accepted->generation) return 0;
  }
}

int socket_accept(struct vsocket *s, bool nonblocking, struct vsocket **out) {
  if (!connection_usable(s)) return -EBADF;
  if (atomic_load(&s->phase) != SOCKET_LISTENING) return -EINVAL;
  uint64_t deadline = connection_deadline(s->receive_timeout_ns);
  struct wait_word words[CONNECTION_WORDS];
  int count = connection_words(s, true, words);
  for (;;) {
    /* Made only when there is something to accept: a thread that is cancelled asleep leaves nothing. */
    if (!nonblocking) {
      int waited = wait_until(words, count, can_accept, s, deadline, s->receive_timeout_ns != 0);
      if (waited == -ETIMEDOUT) return -EAGAIN;
      if (waited) return waited;
    } else if (!can_accept(s)) {
      return -EAGAIN;
    }
    struct vsocket *accepted = socket_new(s->family);
    if (!accepted) return -ENOMEM;
    inherit(accepted, s);
    pthread_mutex_lock(&s->receive_lock);
    int error = accept_one(s, accepted);
    pthread_mutex_unlock(&s->receive_lock);
    if (!error) {
      *out = accepted;
      return 0;
    }
    socket_release(accepted);
    if (error != -EAGAIN || nonblocking) return error;
  }
}

/* ---- connect ---- */

/* The own address for a connection to `peer` on `node`. */
static struct vmmc_address source_for(const struct vsocket *s, const struct vmmc_address *peer, uint32_t node) {
  struct vmmc_address local = *peer;
  local.port = s->bound ? s->local.port : 0;
  if (s->bound && !address_is_wildcard(&s->local))
    memcpy(local.ip, s->local.ip, sizeof local.ip);
  else if (address_is_loopback(peer))
    address_loopback(&local);
  else
    address_of_node(&local, node == s->endpoint->node ? node : s->endpoint->node);
  return local;
}

/* The connection failed (or is given up): the slot goes, the socket can connect again.  What the program
 * bound stays bound to the socket: the next request asks for it. */
static void abandon(struct vsocket *s, uint32_t bits) {
  /* No send or receive may be in the slot when somebody else gets it. */
  pthread_mutex_lock(&s->send_lock);
  pthread_mutex_lock(&s->receive_lock);
  if (s->generation) {
    atomic_fetch_or(&app_slot(s->endpoint, s->slot)->shut, bits);
    endpoint_ring_slot(s->endpoint, s->slot);
    give_slot_back(s);
  }
  s->generation = 0;
  s->shut = 0;
  atomic_store_explicit(&s->phase, s->bound ? SOCKET_BOUND : SOCKET_NEW, memory_order_release);
  pthread_mutex_unlock(&s->receive_lock);
  pthread_mutex_unlock(&s->send_lock);
  connection_wake_local(s);
}

static bool connect_decided(void *context) { return !connection_view(context).connecting; }

/* The first connect: asks the NIC.  0: under way. */
static int connect_begin(struct vsocket *s, const struct sockaddr *address, socklen_t length) {
  struct vmmc_address peer;
  uint32_t node = 0;
  int error = address_read(address, length, s->family, &peer);
  if (error) return error;
  if ((s->bind_flags & VMMC_BIND_V6ONLY) && address_is_v4(&peer)) return -ENETUNREACH;
  switch (address_route(&peer, &node)) {
    case ROUTE_UNREACHABLE: return -EHOSTUNREACH;
    case ROUTE_KERNEL: return -ENETUNREACH; /* not a connection of this layer's */
    case ROUTE_NODE: break;
  }
  if (address_is_wildcard(&peer)) address_loopback(&peer);
  error = take_slot(s);
  if (error) return error;
  struct vmmc_address local = source_for(s, &peer, node);
  post_request(s, VMMC_REQUEST_CONNECT, &local, &peer, node, 0);
  error = await_answer(s);
  if (error) {
    abandon(s, VMMC_CLOSED);
    return error;
  }
  learn_addresses(s);
  atomic_store_explicit(&s->phase, SOCKET_CONNECTING, memory_order_release);
  return 0;
}

/* There is an outcome: a failed socket is as new afterwards. */
static int connect_outcome(struct vsocket *s) {
  if (connection_view(s).connected) {
    atomic_store_explicit(&s->phase, SOCKET_CONNECTED, memory_order_release);
    return 0;
  }
  int error = connection_take_error(s);
  abandon(s, VMMC_CLOSED);
  return error ? -error : -ECONNABORTED; /* SO_ERROR had it already */
}

/* Under control: what the phase says, or a request that is under way afterwards (0, *wait). */
static int connect_step(struct vsocket *s, const struct sockaddr *address, socklen_t length, int *pending) {
  *pending = 0;
  switch (atomic_load(&s->phase)) {
    case SOCKET_LISTENING:
    case SOCKET_CONNECTED: return -EISCONN;
    case SOCKET_CONNECTING:
      if (connect_decided(s)) return connect_outcome(s);
      *pending = -EALREADY;
      return 0;
    default: {
      int error = connect_begin(s, address, length);
      if (!error) *pending = -EINPROGRESS;
      return error;
    }
  }
}

/* connect() to AF_UNSPEC dissolves the connection. */
static int disconnect(struct vsocket *s) {
  control_begin(s);
  abandon(s, VMMC_CLOSED | VMMC_ABORT);
  s->error = 0;
  control_end(s);
  return 0;
}

int socket_connect(struct vsocket *s, const struct sockaddr *address, socklen_t length, bool nonblocking) {
  sa_family_t family;
  if (length < (socklen_t)sizeof family) return -EINVAL;
  if (!connection_usable(s)) return -EBADF;
  memcpy(&family, &address->sa_family, sizeof family);
  if (family == AF_UNSPEC) return disconnect(s);

  int pending;
  control_begin(s);
  int error = connect_step(s, address, length, &pending);
  control_end(s);
  if (error || !pending) return error;
  if (nonblocking) return pending;

  struct wait_word words[CONNECTION_WORDS];
  int count = connection_words(s, false, words);
  error = wait_until(words, count, connect_decided, s, connection_deadline(s->send_timeout_ns), s->send_timeout_ns != 0);
  if (error == -ETIMEDOUT) return pending;
  if (error) return error; /* a handler ran: it goes on in the background */
  control_begin(s);
  uint32_t phase = atomic_load(&s->phase);
  if (phase == SOCKET_CONNECTING)
    error = connect_outcome(s);
  else /* another thread that waited for the same was faster */
    error = phase == SOCKET_CONNECTED ? 0 : -ECONNABORTED;
  control_end(s);
  return error;
}

/* ---- shutdown ---- */

int socket_shutdown(struct vsocket *s, int how) {
  if (how < SHUT_RD || how > SHUT_RDWR) return -EINVAL;
  if (!connection_usable(s)) return -EBADF;
  uint32_t bits = (how != SHUT_WR ? VMMC_SHUT_READ : 0) | (how != SHUT_RD ? VMMC_SHUT_WRITE : 0);
  if (atomic_load(&s->phase) == SOCKET_LISTENING) {
    /* Linux: it stops listening, and keeps its address. */
    if (!(bits & VMMC_SHUT_READ)) return 0;
    control_begin(s);
    if (atomic_load(&s->phase) == SOCKET_LISTENING) {
      s->bound = true;
      abandon(s, VMMC_CLOSED);
    }
    control_end(s);
    return 0;
  }
  struct connection_view view = connection_view(s);
  if (view.connecting) {
    control_begin(s);
    if (connection_view(s).connecting) {
      /* Linux: the attempt ends. */
      atomic_store(&s->error, ECONNRESET);
      abandon(s, VMMC_CLOSED);
    }
    control_end(s);
    return 0;
  }
  if (!view.connected || view.dead) return -ENOTCONN;
  pthread_mutex_lock(&s->send_lock); /* bytes that a send is about to publish go before the end */
  atomic_fetch_or(&s->shut, bits);
  atomic_fetch_or(&app_slot(s->endpoint, s->slot)->shut, bits);
  endpoint_ring_slot(s->endpoint, s->slot);
  pthread_mutex_unlock(&s->send_lock);
  connection_wake_local(s);
  return 0;
}

/* ---- close ---- */

static bool delivered(void *context) {
  struct vsocket *s = context;
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  uint32_t state = atomic_load_explicit(&n->state, memory_order_acquire);
  return state == VMMC_FREE || state == VMMC_DEAD ||
         atomic_load_explicit(&n->generation, memory_order_acquire) != s->generation;
}

/* SO_LINGER: until the NIC has nothing left to deliver, or the time is over. */
static void linger(struct vsocket *s) {
  struct wait_word words[CONNECTION_WORDS];
  int count = connection_words(s, false, words);
  wait_until(words, count, delivered, s, connection_deadline((uint64_t)s->linger_s * 1000000000u), true);
}

static void end(struct vsocket *s) {
  if (atomic_exchange(&s->ended, 1) || !s->generation) return;
  if (!connection_usable(s)) return; /* a child of fork: the parent's connection goes on */
  uint32_t bits = VMMC_CLOSED;
  if (s->linger_s == 0 && connection_view(s).connected) bits |= VMMC_ABORT;
  if (s->forks != atomic_load_explicit(&forks, memory_order_relaxed)) bits |= VMMC_FORKED;
  atomic_fetch_or(&app_slot(s->endpoint, s->slot)->shut, bits);
  endpoint_ring_slot(s->endpoint, s->slot);
  if (s->linger_s > 0 && connection_view(s).connected) linger(s);
  give_slot_back(s);
}

int socket_close(struct vsocket *s) {
  atomic_store(&s->closing, 1);
  /* Threads in calls on it keep it open, as they do on Linux; the last one's release ends it. */
  if (atomic_load(&s->references) == 1) end(s);
  return 0;
}

void socket_release(struct vsocket *s) {
  /* Ended before the count falls to 0: from then on the memory may be another socket's. */
  uint32_t n = atomic_load_explicit(&s->references, memory_order_acquire);
  do {
    if (n == 1) end(s);
  } while (!atomic_compare_exchange_weak_explicit(&s->references, &n, n - 1, memory_order_acq_rel, memory_order_acquire));
  if (n != 1) return;
  pthread_mutex_lock(&pool_lock);
  s->next_free = pool_free;
  pool_free = s;
  pthread_mutex_unlock(&pool_lock);
}

/* ---- readiness groups ---- */

void socket_set_watch(struct vsocket *s, uint64_t groups) {
  atomic_store(&s->watch, groups);
  if (s->generation && connection_usable(s)) atomic_store(&app_slot(s->endpoint, s->slot)->watch, groups);
}
