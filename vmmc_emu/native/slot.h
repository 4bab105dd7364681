/* slot.h: the slots of an endpoint, as sockets take them and give them back. */
#ifndef VMMC_SLOT_H
#define VMMC_SLOT_H

#include "socket.h"

/* What the library remembers of a slot, beside the shared memory.  Private to this process. */
struct slot_memory {
  _Atomic(struct vsocket *) socket; /* who holds it */
  uint32_t generation;              /* of its last holder */
  /* The transmit ring's places of stream positions [committed_from, committed_to) are allocated, as long as
   * nic_slot.ring_taken is ring_taken (the holder's send_lock). */
  uint64_t committed_from, committed_to;
  uint32_t ring_taken;
  uint64_t redirections;            /* generations of redirections given out (the holder's receive_lock) */
  bool spare;                       /* out of use, and what is allocated counts among the spare bytes */
};
struct slot_memory *slot_memory(struct endpoint *e, uint32_t slot);

/* Takes an active slot of this process's endpoint, which it attaches first when need be.  0 (also when s
 * has one) or -errno.  Called by the one thread that has the control of s. */
int slot_take(struct vsocket *s);

/* Makes s the holder of a passive slot, which the NIC filled.  0 or -ENOBUFS. */
int slot_adopt(struct vsocket *s, struct endpoint *e, struct vmmc_accept_entry entry);

/* The app's half of the slot of s, which stays that until slot_let_go, in whatever thread s leaves it meanwhile; NULL:
 * it has none (or not in this process), and slot_let_go all the same.  Nothing else is done in between. */
struct vmmc_app_slot *slot_hold(struct vsocket *s);
void slot_let_go(struct vsocket *s);

/* Tells the NIC that s is done with its slot (bits of VMMC_SHUT_* and their like, VMMC_CLOSED among them).  From
 * here on s is not its holder: a passive slot may have another one, in another thread, before this returns. */
void slot_leave(struct vsocket *s, uint32_t bits);

/* The slot that was left: its ring's pages, and an active one itself, are used again once the NIC is done with it.
 * Nobody uses it through s any more. */
void slot_give_back(struct vsocket *s);

/* The socket that holds the slot now, without a reference. */
struct vsocket *slot_holder(struct endpoint *e, uint32_t slot);

/* A fork must find the lock free: its child may open sockets of its own. */
void slots_before_fork(void);
void slots_after_fork(void);

#endif
