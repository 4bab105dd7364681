/*
 * socket.h: stream sockets on VMMC, without descriptors: what the preload library puts under the
 * calls of the BSD socket interface.
 *
 * Every function that can fail returns -errno as Linux TCP would, never touches errno, raises no
 * signal.  All are thread-safe: a send in one thread, a receive in a second and a close in a third
 * are what users do.  Only connection set-up, bind and listen ask the NIC and wait for its answer.
 *
 *   socket.c       socket, references, close
 *   slot.c         slots of the endpoint: taken, adopted, given back
 *   connection.c   bind, listen, accept, connect, shutdown
 *   stream.c       send, receive, redirection of receives into the heap, readiness
 *   options.c      getsockopt, setsockopt, names, FIONREAD and its like
 */
#ifndef VMMC_SOCKET_H
#define VMMC_SOCKET_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "endpoint.h"
#include "internal.h"
#include "wait.h"

VMMC_INTERNAL_BEGIN

enum socket_phase { SOCKET_NEW, SOCKET_BOUND, SOCKET_LISTENING, SOCKET_CONNECTING, SOCKET_CONNECTED };

struct vsocket {
  _Atomic uint32_t references;
  int family;               /* AF_INET or AF_INET6 */
  struct endpoint *endpoint;
  uint32_t slot, generation; /* generation 0: no slot yet */
  pthread_mutex_t slot_lock; /* the innermost one: who stores options into the slot holds it, see slot_hold */
  bool has_slot;             /* it is ours still (slot_lock) */
  _Atomic uint32_t phase;   /* enum socket_phase */
  pthread_mutex_t send_lock, receive_lock, control_lock; /* never held while asleep */
  /* options, in the units of the socket interface */
  uint64_t receive_timeout_ns, send_timeout_ns; /* 0: none */
  uint32_t receive_buffer, send_buffer;         /* bytes, 0: default */
  int32_t linger_s;                             /* -1: off */
  uint32_t bind_flags;                          /* VMMC_BIND_* */
  uint32_t flags;                               /* nodelay, keepalive … kept and given back */
  _Atomic int32_t error;                        /* SO_ERROR not yet taken, as errno */
  _Atomic uint32_t error_taken;                 /* the NIC's error was given out once */
  int32_t error_before;                         /* `error` before connect asked the NIC (control) */
  _Atomic uint64_t watch, exclusive;            /* wake groups, as stored in the slot */
  _Atomic(void *) readiness;                    /* private to the readiness layer (its file) */

  /* private to this layer; connection.h says what its files share */
  struct vsocket *next_free;          /* in the pool of unused sockets */
  struct vmmc_address local, peer;    /* own address once bound or connected, the peer's once connected */
  _Atomic uint32_t forks;             /* of this process when the socket was made, or last used */
  bool bound;                         /* the program chose `local`, its port at least, by bind */
  bool bound_address;                 /* its address as well: not a wildcard */
  bool control_busy;                  /* a bind, listen or connect is between its request and its answer */
  _Atomic uint32_t closing;           /* socket_close was called */
  _Atomic uint32_t ended;             /* the slot was given back: nothing is left to close */
  _Atomic uint32_t shut;              /* VMMC_SHUT_READ and _WRITE: what the program shut down */
  _Atomic uint32_t shutdowns;         /* calls of shutdown: each is news to edge-triggered sets, as on Linux */
  _Atomic uint32_t within_node;       /* its connection, if it has one, is to this node */
  _Atomic uint32_t dissolved;         /* connections given up: a call that blocked on one ends with EPIPE, as on Linux */
  _Atomic uint32_t local_wake;        /* changed by this process when a waiter must look again */
  _Atomic uint32_t local_asleep;      /* threads that sleep on it */
  uint32_t request;                   /* newest request in the slot's mailbox */
  uint32_t low_water;                 /* SO_RCVLOWAT */
  uint64_t rung;                      /* `consumed` when the NIC was last told (receive_lock) */
  uint64_t outstanding;               /* most bytes ever seen waiting in the default buffer (receive_lock) */
  _Atomic uint64_t full_at;           /* `limit` when the socket was last found full: for edges */
  struct redirected_receive *redirecting; /* the receive that has its address posted, or NULL (receive_lock) */
  int32_t kept[47];                   /* options that are accepted and given back: options.c; */
  char congestion[16];                /* and the name that TCP_CONGESTION was given, empty: none */
};

/* socket(): no slot is taken and nothing is attached until it is needed. NULL: ENOMEM. */
struct vsocket *socket_new(int family);
void socket_release(struct vsocket *s); /* the last reference closes it: see socket_close */

/* The last descriptor is gone: the NIC delivers what is written, then ends the connection; threads
 * blocked in calls on it go on as Linux lets them.  Waits only for SO_LINGER. 0 or -errno. */
int socket_close(struct vsocket *s);

int socket_bind(struct vsocket *s, const struct sockaddr *address, socklen_t length);
int socket_listen(struct vsocket *s, int backlog);
int socket_accept(struct vsocket *s, bool nonblocking, struct vsocket **out);
int socket_connect(struct vsocket *s, const struct sockaddr *address, socklen_t length, bool nonblocking);
int socket_shutdown(struct vsocket *s, int how);

enum { SOCKET_ANY_HANDLER = 0x10000000 }; /* beside MSG_*, of which none has this bit */

/* Bytes moved, 0 at end of file (receive), or -errno; -EPIPE without the signal.  Flags: MSG_*; receive: also
 * SOCKET_ANY_HANDLER, a handler with SA_RESTART interrupts it, too.
 * MSG_DONTWAIT is the caller's to pass for a non-blocking descriptor. */
ssize_t socket_send(struct vsocket *s, const struct iovec *vector, int count, int flags);
ssize_t socket_receive(struct vsocket *s, const struct iovec *vector, int count, int flags);

int socket_name(struct vsocket *s, bool peer, struct sockaddr *address, socklen_t *length);
int socket_getsockopt(struct vsocket *s, int level, int name, void *value, socklen_t *length);
int socket_setsockopt(struct vsocket *s, int level, int name, const void *value, socklen_t length);
uint64_t socket_keepalive(const struct vsocket *s); /* as in vmmc_app_slot */
int socket_ioctl(struct vsocket *s, unsigned long request, int *number); /* -ENOTTY: not ours */

/* What is ready now, as EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLHUP | EPOLLERR. */
uint32_t socket_ready(struct vsocket *s);

/* Edge positions for edge-triggered epoll: change whenever a new EPOLLIN or EPOLLOUT edge came. */
struct socket_edges { uint64_t in, out; };
struct socket_edges socket_edges(struct vsocket *s);

/* Sets the wake groups that want this socket's events (app_slot.watch), seq_cst; a socket without a
 * slot yet remembers them. */
void socket_set_watch(struct vsocket *s, uint64_t groups, uint64_t exclusive);

/* All that a thread which waits for this socket sleeps on (see wait.h): how many words.  One of them is for
 * what this process itself does to the socket; one without a slot has no other. */
enum { SOCKET_WORDS = 3 };
int socket_wait_words(struct vsocket *s, bool receive, bool send, struct wait_word words[SOCKET_WORDS]);

/* What stands in `readiness` of the socket that holds `slot` of endpoint e now (for the event ring), or NULL.  It may
 * be over by the time that it is looked at: then it is another one's, to whom the look does no harm. */
void *socket_readiness_of_slot(struct endpoint *e, uint32_t slot);

/* ---- addresses of the cluster ---- */

/* Where a connection to this address goes.  Loopback and the node's own addresses are the node. */
enum socket_route { ROUTE_KERNEL, ROUTE_NODE, ROUTE_UNREACHABLE };
enum socket_route socket_route_of(const struct sockaddr *address, socklen_t length, uint32_t *node);
/* True for addresses a socket may be bound to on this node: wildcards, loopback, the node's own. */
bool socket_address_is_local(const struct sockaddr *address, socklen_t length);
/* The environment: this node's index and the number of nodes, without attaching. False: not on one. */
bool socket_place(uint32_t *node, uint32_t *nodes);
/* True when VMMC_KERNEL_PORTS lists this port. */
bool socket_port_is_kernels(uint16_t port);

VMMC_INTERNAL_END

#endif
