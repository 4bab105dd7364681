/* endpoint.h: this process's attachment to a node: its segments, doorbell and wakers. */
#ifndef VMMC_ENDPOINT_H
#define VMMC_ENDPOINT_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "internal.h"
#include "vmmc_idle.h"
#include "vmmc_layout.h"

VMMC_INTERNAL_BEGIN

struct endpoint {
  char *app;                 /* segment that this process writes (VMMC_APP_BYTES) */
  const char *nic;           /* segment that the NIC writes, mapped read-only */
  const struct vmmc_pub *pub;
  uint32_t node, nodes;      /* own index, and how many nodes the cluster has */
  uint32_t index, serial;    /* which endpoint of the node */
  int32_t pid;               /* the process that attached */
  int attach_fd;             /* the daemon's view of our life; close-on-exec, numbered high */
  _Atomic int memory;        /* may the NIC write our memory: 0 not asked yet, 1 yes, -1 no */
  _Atomic bool end_said;     /* stderr has the line that says why its NIC serves it no more */
  void *vmmc;                /* private to the VMMC API (vmmc.c) */
  void *sockets;             /* private to the socket layer (connection.c) */
};

/* Attaches this process to the node whose daemon listens at `socket_path`.  A visitor does not run on
 * the node: it is not ended with the cluster.  0 or -errno. */
int endpoint_attach(const char *socket_path, bool visitor, struct endpoint **out);

/* Unmaps and closes; the daemon sees the socket close, the NIC then delivers and frees. */
void endpoint_detach(struct endpoint *endpoint);

/* The endpoint that this process's sockets use: attached on first use to the node named by the
 * environment (VMMC_SOCKET, the daemon's socket path).  NULL with errno set: ENOTCONN when
 * the environment names no node.  Thread-safe.  After a fork the child has none until it asks. */
struct endpoint *endpoint_default(void);

/* The same, without attaching: NULL when there is none (yet, or in this child of a fork). */
struct endpoint *endpoint_current(void);

/* True when this process is one that endpoint_default() belongs to; false in a child of fork, also
 * of one that ran no handlers (a WIPEONFORK byte tells).  One load. */
bool endpoint_is_ours(void);

/* Called in the child of a fork (by the fork handler that endpoint.c registers) before anything
 * else: forgets the endpoint.  `hook` runs after that; one hook, set by the socket layer. */
void endpoint_on_fork(void (*hook)(void));

/* Descriptors that the library holds for itself (attach socket, event descriptors): moved to a high
 * number, close-on-exec, and recorded, so that a program's close() does not hit them. */
int endpoint_private_descriptor(int fd); /* takes fd, returns the high one or -errno */
bool endpoint_descriptor_is_private(int fd);
void endpoint_private_close(int fd); /* closes one of them and forgets it */

/* Gives the NIC an event descriptor as waker `number` (0 .. VMMC_WAKERS - 1).  0 or -errno. */
int endpoint_give_waker(struct endpoint *endpoint, uint32_t number, int eventfd);

/* Lets the NIC write this process's memory, from the first call on; false: that cannot be. */
bool endpoint_give_memory(struct endpoint *endpoint);

/* 0, or -ENETDOWN once the NIC serves this process no more, which is said on stderr once an endpoint. */
int endpoint_served(struct endpoint *endpoint);

/* ---- parts of the segments ---- */
static inline struct vmmc_app_header *app_header(const struct endpoint *e) { return (void *)e->app; }
static inline const struct vmmc_nic_header *nic_header(const struct endpoint *e) { return (const void *)e->nic; }
static inline struct vmmc_app_slot *app_slot(const struct endpoint *e, uint32_t slot) {
  return (struct vmmc_app_slot *)(e->app + VMMC_APP_SLOTS) + slot;
}
static inline const struct vmmc_nic_slot *nic_slot(const struct endpoint *e, uint32_t slot) {
  return (const struct vmmc_nic_slot *)(e->nic + VMMC_NIC_SLOTS) + slot;
}
static inline char *transmit_ring(const struct endpoint *e, uint32_t slot) {
  return e->app + VMMC_APP_RINGS + (uint64_t)slot * VMMC_RING;
}
static inline const char *default_buffer(const struct endpoint *e, uint32_t slot) {
  return e->nic + VMMC_NIC_RINGS + (uint64_t)slot * VMMC_RING;
}

/* The NIC serves this process no more (looked at again by every sleeper that it wakes). */
static inline bool endpoint_detached(const struct endpoint *e) {
  return atomic_load_explicit(&nic_header(e)->detached, memory_order_acquire);
}

/* Tells the NIC to look at `slot` (dirty bits), or at the command queue; wakes it when it sleeps.
 * Every store that the NIC is to see must come before. */
void endpoint_ring_slot(struct endpoint *endpoint, uint32_t slot);
void endpoint_ring_commands(struct endpoint *endpoint);

/* Before a call says what is ready, as far as it knows: has the NIC seen all that was rung?  If not, it gets a
 * chance to, and the result is true: look again.  Once a call. */
bool endpoint_let_nic_look(struct vmmc_idle *idle);

/* Before a call says that nothing has come: whether what this thread sent may be on its way still.  Then the NIC gets
 * time to bring it, if it is for this node, and the result is true: look again. */
bool endpoint_let_nic_catch_up(void);

/* Allocates the pages under [start, start + length) of a segment, so that no later store (or, for a
 * segment mapped read-only, load) there meets a full /dev/shm as SIGBUS.  0, or -ENOBUFS when the
 * memory is not there. */
int endpoint_commit(const void *start, uint64_t length, bool writable);

VMMC_INTERNAL_END

#endif
