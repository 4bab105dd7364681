/*
 * connection.c: how a socket gets its connection: bind, listen, accept, connect, and shutdown.
 *
 * bind, listen and connect are requests to the NIC, which answers in the slot.  The outcome of a connect
 * comes later: CONNECTED, or an error, in the slot's status.
 */
#include "connection.h"

#include <errno.h>
#include <string.h>

#include "address.h"
#include "slot.h"
#include "sys.h"

enum { BACKLOG_MAX = 4096 }; /* net.core.somaxconn */

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
  if (phase == SOCKET_CONNECTING &&
      atomic_load_explicit(&n->generation, memory_order_acquire) != s->generation)
    view.status = 0;
  view.connected = phase == SOCKET_CONNECTED || (view.status & VMMC_CONNECTED);
  view.dead = view.status & VMMC_ERRNO_MASK;
  view.connecting = !view.connected && !view.dead;
  if (view.dead) endpoint_served(s->endpoint); /* that all of them are, and why, is worth a line */
  return view;
}

uint64_t connection_unsent(const struct vsocket *s) {
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  uint64_t transmitted = atomic_load_explicit(&n->transmitted, memory_order_acquire);
  uint64_t written = atomic_load_explicit(&app_slot(s->endpoint, s->slot)->written, memory_order_relaxed);
  return written > transmitted ? written - transmitted : 0;
}

uint64_t connection_unacknowledged(struct vsocket *s) {
  struct vmmc_app_slot *a = slot_hold(s);
  uint64_t left = 0;
  if (a) {
    const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
    uint64_t acknowledged = atomic_load_explicit(&n->acknowledged, memory_order_acquire);
    uint64_t written = atomic_load_explicit(&a->written, memory_order_relaxed);
    if (written > acknowledged) {
      left = written - acknowledged;
      atomic_store_explicit(&a->wanted, written, memory_order_relaxed);
      endpoint_ring_slot(s->endpoint, s->slot);
    }
  }
  slot_let_go(s);
  return left;
}

bool connection_over(const struct vsocket *s) {
  struct connection_view view = connection_view(s);
  if (view.dead) return true;
  return view.connected && (view.status & VMMC_END_OF_FILE) &&
         (atomic_load_explicit(&s->shut, memory_order_relaxed) & VMMC_SHUT_WRITE) && !connection_unsent(s);
}

uint32_t connection_leave(struct vsocket *s, bool reset) {
  if (!connection_view(s).connected) return VMMC_CLOSED;
  if (!connection_over(s)) return reset ? VMMC_CLOSED | VMMC_ABORT : VMMC_CLOSED;
  /* Both ends of the stream were sent, there is nothing left to reset: what nobody read does not count. */
  atomic_store_explicit(&app_slot(s->endpoint, s->slot)->consumed,
                        atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->placed, memory_order_acquire),
                        memory_order_release);
  return VMMC_CLOSED;
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

int socket_wait_words(struct vsocket *s, bool receive, bool send, struct wait_word words[SOCKET_WORDS]) {
  int count = 0;
  words[count++] = (struct wait_word){ &s->local_wake, &s->local_asleep };
  if (!s->generation || !connection_usable(s)) return count;
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  if (receive) words[count++] = (struct wait_word){ &n->wake_rx, &a->asleep_rx };
  if (send) words[count++] = (struct wait_word){ &n->wake_tx, &a->asleep_tx };
  return count;
}

void connection_wake_local(struct vsocket *s) {
  /* seq_cst against the sleeper's announcement: see wait.c */
  atomic_fetch_add(&s->local_wake, 1);
  if (atomic_load(&s->local_asleep))
    sys_call(SYS_futex, (long)&s->local_wake, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
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
  critical_lock(&s->control_lock);
  bool free = !s->control_busy;
  critical_unlock(&s->control_lock);
  return free;
}

static void control_release(struct vsocket *s) {
  critical_lock(&s->control_lock);
  s->control_busy = false;
  critical_unlock(&s->control_lock);
  connection_wake_local(s);
}
static void control_left(void *context) { control_release(context); }

/* `undo` is the caller's until control_end. */
static void control_begin(struct vsocket *s, struct wait_undo *undo) {
  struct wait_word word = { &s->local_wake, &s->local_asleep };
  for (;;) {
    critical_lock(&s->control_lock);
    bool mine = !s->control_busy;
    s->control_busy = true;
    if (mine) wait_undo_push(undo, control_left, s);
    critical_unlock(&s->control_lock);
    if (mine) return;
    int cancel; /* neither a signal nor a cancellation ends it */
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
    wait_until(&word, 1, control_is_free, s, WAIT_FOREVER, wait_signals_now(), false);
    pthread_setcancelstate(cancel, NULL);
  }
}

static void control_end(struct vsocket *s, const struct wait_undo *undo) {
  critical_begin(); /* no handler in between */
  wait_undo_pop(undo);
  control_release(s);
  critical_end();
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

static bool answered_or_detached(void *context) {
  struct vsocket *s = context;
  return answered(s) || endpoint_detached(s->endpoint);
}

/* Waits for the answer to the newest request, whatever signals come.  0 or -errno. */
static int await_answer(struct vsocket *s) {
  struct wait_word words[SOCKET_WORDS];
  int count = socket_wait_words(s, false, true, words), cancel;
  /* bind and listen are no cancellation points, and connect's is the wait for its outcome */
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
  while (wait_until(words, count, answered_or_detached, s, WAIT_FOREVER, wait_signals_now(), false)) {
  }
  pthread_setcancelstate(cancel, NULL);
  if (!answered(s)) return endpoint_served(s->endpoint);
  return -nic_slot(s->endpoint, s->slot)->reply_error;
}

static void learn_addresses(struct vsocket *s) {
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  s->local = n->local;
  s->peer = n->peer;
}

/* ---- bind and listen ---- */

static struct vmmc_address wildcard(int family, uint16_t port) {
  struct vmmc_address any = { .family = (uint16_t)family, .port = port };
  if (family == AF_INET) any.ip[10] = any.ip[11] = 0xff;
  return any;
}

static int bind_slot(struct vsocket *s, const struct vmmc_address *local) {
  int error = slot_take(s);
  if (error) return error;
  post_request(s, VMMC_REQUEST_BIND, local, NULL, 0, 0);
  error = await_answer(s);
  if (error) return error;
  s->local = nic_slot(s->endpoint, s->slot)->local;
  s->bound = true;
  s->bound_address = !address_is_wildcard(&s->local);
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
      local = wildcard(AF_INET, ntohs(in.sin_port));
      error = 0;
    }
  }
  if (error) return error;
  if (!connection_usable(s)) return -EBADF;
  if (!address_is_local(&local)) return -EADDRNOTAVAIL;
  if ((s->bind_flags & VMMC_BIND_V6ONLY) && address_is_v4(&local)) return -EINVAL;
  struct wait_undo undo;
  control_begin(s, &undo);
  if (atomic_load(&s->phase) != SOCKET_NEW || s->bound)
    error = -EINVAL;
  else
    error = bind_slot(s, &local);
  control_end(s, &undo);
  return error;
}

static int listen_slot(struct vsocket *s, int backlog) {
  int error = slot_take(s);
  if (error) return error;
  struct vmmc_address local = s->bound ? s->local : wildcard(s->family, 0);
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
  struct wait_undo undo;
  control_begin(s, &undo);
  uint32_t phase = atomic_load(&s->phase);
  int error = phase == SOCKET_CONNECTING || phase == SOCKET_CONNECTED ? -EINVAL : listen_slot(s, backlog);
  control_end(s, &undo);
  return error;
}

/* ---- accept ---- */

uint64_t connection_accepts_waiting(const struct vsocket *s) {
  /* acquire: an entry lies in the buffer before `placed` counts it */
  return atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->placed, memory_order_acquire) -
         atomic_load_explicit(&app_slot(s->endpoint, s->slot)->consumed, memory_order_relaxed);
}

static bool can_accept(void *context) {
  struct connection_wait *w = context;
  struct vsocket *s = w->socket;
  return connection_was_dissolved(s, w->dissolved) ||
         atomic_load_explicit(&s->phase, memory_order_acquire) != SOCKET_LISTENING || endpoint_detached(s->endpoint) ||
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
  s->bound_address = listener->bound_address;
  s->flags = listener->flags;
  s->low_water = listener->low_water;
  memcpy(s->kept, listener->kept, sizeof s->kept);
  memcpy(s->congestion, listener->congestion, sizeof s->congestion);
}

/* Takes the first waiting connection into `accepted`.  -EAGAIN: none waits.  receive_lock is held. */
static int accept_one(struct vsocket *s, struct vsocket *accepted) {
  struct endpoint *e = s->endpoint;
  struct vmmc_app_slot *a = app_slot(e, s->slot);
  for (;;) {
    if (atomic_load(&s->phase) != SOCKET_LISTENING) return -EINVAL;
    int served = endpoint_served(e);
    if (served) return served;
    if (connection_accepts_waiting(s) < sizeof(struct vmmc_accept_entry)) return -EAGAIN;
    uint64_t consumed = atomic_load_explicit(&a->consumed, memory_order_relaxed);
    struct vmmc_accept_entry entry;
    memcpy(&entry, default_buffer(e, s->slot) + consumed % VMMC_RING, sizeof entry);
    if (entry.slot >= VMMC_ACTIVE_SLOTS && entry.slot < VMMC_SLOTS) {
      int error = slot_adopt(accepted, e, entry);
      if (error) return error; /* it goes on waiting */
      learn_addresses(accepted);
      bool within = nic_slot(e, entry.slot)->peer_node == e->pub->node;
      atomic_store_explicit(&accepted->within_node, within, memory_order_relaxed);
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
  struct connection_wait wait = connection_wait_begin(s);
  if (atomic_load(&s->phase) != SOCKET_LISTENING) return -EINVAL;
  uint64_t deadline = connection_deadline(s->receive_timeout_ns);
  struct wait_word words[SOCKET_WORDS];
  int count = socket_wait_words(s, true, false, words);
  for (;;) {
    /* Made only when there is something to accept: a thread that is cancelled asleep leaves nothing. */
    if (!nonblocking) {
      int waited = wait_until(words, count, can_accept, &wait, deadline, wait.since, s->receive_timeout_ns != 0);
      if (waited == -ETIMEDOUT) return -EAGAIN;
      if (waited) return waited;
    } else if (!can_accept(&wait)) {
      return -EAGAIN;
    }
    struct vsocket *accepted = socket_new(s->family);
    if (!accepted) return -ENOMEM;
    inherit(accepted, s);
    critical_lock(&s->receive_lock);
    int error = connection_was_dissolved(s, wait.dissolved) ? -EINVAL : accept_one(s, accepted);
    critical_unlock(&s->receive_lock);
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
static struct vmmc_address source_for(const struct vsocket *s, const struct vmmc_address *peer,
                                      uint32_t node) {
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

static bool nic_is_done(void *context) {
  struct vsocket *s = context;
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  uint32_t state = atomic_load_explicit(&n->state, memory_order_acquire);
  return state == VMMC_FREE || state == VMMC_DEAD ||
         atomic_load_explicit(&n->generation, memory_order_acquire) != s->generation;
}

int connection_await_nic(struct vsocket *s, uint64_t deadline_ns) {
  struct wait_word words[SOCKET_WORDS];
  int count = socket_wait_words(s, false, true, words);
  /* A thread that is cancelled meanwhile must still give the slot back: it is cancelled after that. */
  int cancel;
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
  int waited = wait_until(words, count, nic_is_done, s, deadline_ns, wait_signals_now(), true);
  pthread_setcancelstate(cancel, NULL);
  return waited;
}

/* Until the NIC has taken a listening socket off its port, so that who connects after the call that gave it up is
 * refused: peers' NICs may answer for a listener (nodes/nic/port.c). */
static void stop_listening(struct vsocket *s) {
  enum { PATIENCE_NS = 1000000000 }; /* a NIC that was killed has a successor long before */
  if (!s->generation || atomic_load(&s->phase) != SOCKET_LISTENING || endpoint_detached(s->endpoint)) return;
  /* First, so that no other thread accepts what the NIC is about to reset. */
  critical_lock(&s->receive_lock);
  atomic_store_explicit(&s->phase, SOCKET_BOUND, memory_order_release);
  critical_unlock(&s->receive_lock);
  /* seq_cst: before the look at whether the NIC sleeps, in the ring that follows */
  atomic_fetch_or(&app_slot(s->endpoint, s->slot)->shut, VMMC_CLOSED);
  endpoint_ring_slot(s->endpoint, s->slot);
  uint64_t deadline = connection_deadline(PATIENCE_NS);
  while (connection_await_nic(s, deadline) == -EINTR) { /* by a signal, which is put off until the caller is done */
  }
}

void connection_give_up(struct vsocket *s, uint32_t bits) {
  /* No handler until it is done: it could jump out of it half given up, or make the same call and wait for us. */
  critical_begin();
  stop_listening(s);
  /* No send or receive may be in the slot when somebody else gets it. */
  critical_lock(&s->send_lock);
  critical_lock(&s->receive_lock);
  s->shut = 0;
  if (s->generation) stream_give_up(s);
  if (!s->bound_address) s->local = wildcard(s->family, s->local.port); /* Linux tells of the port still */
  atomic_fetch_add(&s->dissolved, 1);
  /* Before the NIC hears of it, which wakes whoever waits for readiness. */
  atomic_store_explicit(&s->phase, s->bound ? SOCKET_BOUND : SOCKET_NEW, memory_order_release);
  if (s->generation) {
    slot_leave(s, bits);
    slot_give_back(s);
  }
  s->generation = 0;
  critical_unlock(&s->receive_lock);
  critical_unlock(&s->send_lock);
  connection_wake_local(s);
  critical_end();
}

static bool connect_decided(void *context) { return !connection_view(context).connecting; }

/* The first connect: asks the NIC. */
static int connect_ask(struct vsocket *s, const struct sockaddr *address, socklen_t length) {
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
  error = slot_take(s);
  if (error) return error;
  struct vmmc_address local = source_for(s, &peer, node);
  s->peer = peer;
  s->error_before = atomic_exchange(&s->error, 0);
  atomic_store_explicit(&s->within_node, (uint32_t)node == s->endpoint->pub->node, memory_order_relaxed);
  /* Before the NIC is asked: the peer may have accepted, and this process's other threads know of it, before
   * this one has run again.  To them a socket that is not connecting has hung up. */
  atomic_store_explicit(&s->phase, SOCKET_CONNECTING, memory_order_release);
  post_request(s, VMMC_REQUEST_CONNECT, &local, &peer, node, 0);
  return 0;
}

/* What the NIC says to that, as soon as it has looked: 0: under way. */
static int connect_answer(struct vsocket *s) {
  int error = await_answer(s);
  if (!error) {
    learn_addresses(s);
    return 0;
  }
  connection_give_up(s, VMMC_CLOSED);
  atomic_store(&s->error, s->error_before);
  return error;
}

/* For who waits for the outcome, and needs no answer of its own before that: unless it is that there will be none. */
static bool connect_settled(void *context) {
  struct vsocket *s = context;
  return connect_decided(s) || endpoint_detached(s->endpoint) ||
         (answered(s) && nic_slot(s->endpoint, s->slot)->reply_error);
}

/* There is an outcome: a failed socket is as new afterwards. */
static int connect_outcome(struct vsocket *s) {
  learn_addresses(s); /* of a failed one as well: its port is told of still */
  if (connection_view(s).connected) {
    atomic_store_explicit(&s->phase, SOCKET_CONNECTED, memory_order_release);
    return 0;
  }
  int error = connection_take_error(s);
  connection_give_up(s, VMMC_CLOSED);
  return error ? -error : -ECONNABORTED; /* SO_ERROR had it already */
}

/* Under control: what the phase says, or a request that was made (0, *pending: what to say without an outcome). */
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
      int error = connect_ask(s, address, length);
      if (!error) *pending = -EINPROGRESS;
      return error;
    }
  }
}

/* connect() to AF_UNSPEC dissolves the connection. */
static int disconnect(struct vsocket *s) {
  struct wait_undo undo;
  control_begin(s, &undo);
  struct connection_view view = connection_view(s);
  bool resets = (view.connected || view.connecting) && !connection_over(s);
  /* The error before what wakes: as Linux, which resets the connection on this side too. */
  atomic_store(&s->error, resets ? ECONNRESET : connection_pending_error(s));
  connection_give_up(s, connection_leave(s, true));
  control_end(s, &undo);
  return 0;
}

int socket_connect(struct vsocket *s, const struct sockaddr *address, socklen_t length, bool nonblocking) {
  sa_family_t family;
  if (length < (socklen_t)sizeof family) return -EINVAL;
  if (!connection_usable(s)) return -EBADF;
  memcpy(&family, &address->sa_family, sizeof family);
  if (family == AF_UNSPEC) return disconnect(s);

  int pending;
  struct wait_signals since = wait_signals_now();
  struct wait_undo undo;
  control_begin(s, &undo);
  int error = connect_step(s, address, length, &pending);
  if (pending == -EINPROGRESS && nonblocking) error = connect_answer(s);
  control_end(s, &undo);
  if (error || !pending) return error;
  if (nonblocking) return pending;

  struct wait_word words[SOCKET_WORDS];
  int count = socket_wait_words(s, false, true, words);
  int waited = wait_until(words, count, connect_settled, s, connection_deadline(s->send_timeout_ns), since,
                          s->send_timeout_ns != 0);
  control_begin(s, &undo);
  if (atomic_load(&s->phase) != SOCKET_CONNECTING) /* another thread that waited for the same was faster */
    error = atomic_load(&s->phase) == SOCKET_CONNECTED ? 0 : -ECONNABORTED;
  else if (!waited && connect_decided(s))
    error = connect_outcome(s);
  else if (!(error = connect_answer(s))) /* it goes on in the background, where there is still a NIC */
    error = !waited ? endpoint_served(s->endpoint) : waited == -ETIMEDOUT ? pending : waited;
  control_end(s, &undo);
  return error;
}

/* ---- shutdown ---- */

int socket_shutdown(struct vsocket *s, int how) {
  struct wait_undo undo;
  if (how < SHUT_RD || how > SHUT_RDWR) return -EINVAL;
  if (!connection_usable(s)) return -EBADF;
  uint32_t bits = (how != SHUT_WR ? VMMC_SHUT_READ : 0) | (how != SHUT_RD ? VMMC_SHUT_WRITE : 0);
  if (atomic_load(&s->phase) == SOCKET_LISTENING) {
    /* Linux: it stops listening, and keeps its address. */
    if (!(bits & VMMC_SHUT_READ)) return 0;
    control_begin(s, &undo);
    if (atomic_load(&s->phase) == SOCKET_LISTENING) {
      s->bound = true;
      connection_give_up(s, VMMC_CLOSED);
    }
    control_end(s, &undo);
    return 0;
  }
  uint32_t dissolved = atomic_load_explicit(&s->dissolved, memory_order_relaxed);
  struct connection_view view = connection_view(s);
  if (view.connecting) {
    control_begin(s, &undo);
    if (connection_view(s).connecting) {
      /* Linux: the attempt ends. */
      atomic_store(&s->error, ECONNRESET);
      connection_give_up(s, VMMC_CLOSED);
    }
    control_end(s, &undo);
    return 0;
  }
  atomic_fetch_add_explicit(&s->shutdowns, 1, memory_order_relaxed);
  if (!view.connected || view.dead) {
    atomic_fetch_or(&s->shut, bits); /* Linux says that there is nothing to shut, and notes it all the same */
    connection_wake_local(s);
    return -ENOTCONN;
  }
  bool over = connection_over(s);
  critical_lock(&s->send_lock); /* bytes that a send is about to publish go before the end */
  struct vmmc_app_slot *a = connection_was_dissolved(s, dissolved) ? NULL : app_slot(s->endpoint, s->slot);
  if (a) {
    atomic_fetch_or(&s->shut, bits);
    atomic_fetch_or(&a->shut, bits);
    endpoint_ring_slot(s->endpoint, s->slot);
    connection_said(s);
  }
  critical_unlock(&s->send_lock);
  if (!a) return -ENOTCONN; /* another thread gave it up, and may have connected again */
  connection_wake_local(s);
  return over ? -ENOTCONN : 0;
}
