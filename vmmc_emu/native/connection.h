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

/* The error that SO_ERROR or the next call would give, as a positive errno, 0 none. */
int connection_pending_error(struct vsocket *s);
int connection_take_error(struct vsocket *s); /* the same, which is then taken */

/* All that a thread which waits for this socket sleeps on; returns how many words. */
enum { CONNECTION_WORDS = 2 };
int connection_words(struct vsocket *s, bool receive, struct wait_word words[CONNECTION_WORDS]);

/* Bytes of accept entries that wait in a listening socket's stream. */
uint64_t connection_accepts_waiting(const struct vsocket *s);

/* Makes this process's own waiters look again. */
void connection_wake_local(struct vsocket *s);

/* CLOCK_MONOTONIC deadline of a call that may last timeout_ns (0: for ever). */
uint64_t connection_deadline(uint64_t timeout_ns);

#endif
