/* connection.h: what the files of the socket layer share. */
#ifndef VMMC_CONNECTION_H
#define VMMC_CONNECTION_H

#include "socket.h"

/* False once the endpoint is not this process's: the socket was inherited across fork (EBADF). */
static inline bool connection_usable(const struct vsocket *s) {
  return !s->generation || (endpoint_is_ours() && s->endpoint->app);
}

/* Where the connection stands, read at one time. */
struct connection_view {
  uint32_t status;   /* VMMC_ERRNO_MASK, VMMC_END_OF_FILE … */
  bool connecting;   /* under way, no outcome yet */
  bool connected;    /* was established */
  bool dead;         /* reset, refused or unreachable */
};
struct connection_view connection_view(const struct vsocket *s);

/* Reset, or both ends of the stream were sent: TCP's CLOSED, in which the peer has no name any more.  (That
 * the peer's NIC has our end as well is not waited for: in TCP it takes as long as a packet does.) */
bool connection_over(const struct vsocket *s);

/* Was the connection given up (connect to AF_UNSPEC, say) since s->dissolved was read? */
static inline bool connection_was_dissolved(const struct vsocket *s, uint32_t since) {
  return __builtin_expect(atomic_load_explicit(&s->dissolved, memory_order_relaxed) != since, 0);
}

/* One call that may wait: as the connection, and the thread, were when it began. */
struct connection_wait {
  struct vsocket *socket;
  uint32_t dissolved;
  struct wait_signals since;
};
static inline struct connection_wait connection_wait_begin(struct vsocket *s) {
  return (struct connection_wait){ s, atomic_load_explicit(&s->dissolved, memory_order_relaxed), wait_signals_now() };
}

/* A connected socket has something for its peer.  Within the node it is to be there when this thread looks: see
 * endpoint_let_nic_catch_up. */
static inline void connection_said(const struct vsocket *s) {
  if (atomic_load_explicit(&s->within_node, memory_order_relaxed)) wait_self()->rang = true;
}

/* Bytes that were written and that the NIC has yet to send. */
uint64_t connection_unsent(const struct vsocket *s);

/* Bytes of which it is not known yet that the peer's NIC has them.  Who asks is told soon: ask again. */
uint64_t connection_unacknowledged(struct vsocket *s);

/* Before a connection is given up: a receive that has its address posted has what came until now (stream.c).
 * receive_lock is held. */
void stream_give_up(struct vsocket *s);

/* The program leaves the connection: VMMC_CLOSED, and VMMC_ABORT where it is to be reset and is not over. */
uint32_t connection_leave(struct vsocket *s, bool reset);

/* The connection failed, or it or a listener is given up: the slot goes, the socket can connect again.  What the
 * program bound stays bound to the socket: the next request asks for it. */
void connection_give_up(struct vsocket *s, uint32_t bits);

/* Waits until the NIC has nothing left to do for a slot that was left.  0, -ETIMEDOUT, or -EINTR: a handler ran. */
int connection_await_nic(struct vsocket *s, uint64_t deadline_ns);

/* The error that SO_ERROR or the next call would give, as a positive errno, 0 none. */
int connection_pending_error(struct vsocket *s);
int connection_take_error(struct vsocket *s); /* the same, which is then taken */

/* Bytes of accept entries that wait in a listening socket's stream. */
uint64_t connection_accepts_waiting(const struct vsocket *s);

/*
 * Forks of this process so far.  A server that leaves its connections to forked children closes them unread:
 * to their peers that is to look like an end, not like the reset that a close with unread bytes is on TCP,
 * where the child would have read them.  A process that goes on using a socket after a fork (one that saves
 * in the background, say) has not left it to the child.
 */
extern _Atomic uint32_t socket_forks;
static inline void socket_used(struct vsocket *s) {
  uint32_t now = atomic_load_explicit(&socket_forks, memory_order_relaxed);
  if (__builtin_expect(atomic_load_explicit(&s->forks, memory_order_relaxed) != now, 0))
    atomic_store_explicit(&s->forks, now, memory_order_relaxed);
}

/* Makes this process's own waiters look again. */
void connection_wake_local(struct vsocket *s);

/* CLOCK_MONOTONIC deadline of a call that may last timeout_ns (0: for ever). */
uint64_t connection_deadline(uint64_t timeout_ns);

#endif
