/*
 * nic.h: the NIC of one node, as its firmware sees it.
 *
 * The NIC is a duty cycle (main.c): it looks at its links, its endpoints' doorbells, its daemon and
 * what it has yet to transmit, and sleeps when nothing of that gave work.  It is single-threaded.
 *
 *   endpoint.c    programs attached to the node: their segments and doorbells, and their end
 *   port.c        the node's ports: who is bound to what
 *   connection.c  stream connections: set-up, credit, end of file, close and reset
 *   stream.c      their bytes: transmit and place
 *   give_back.c   memory of idle connections
 *   redirect.c    whether bytes go to a posted address instead of the default buffer
 *   command.c     VMMC commands of a program: taken, answered
 *   export.c      exported buffers and imports of others' buffers
 *   transfer.c    send and fetch between them, notifications
 *   utlb.c        translations of programs' pages
 *   dma.c         the copy itself, which survives memory that is not there
 *   link.c        the ordered channel to another NIC
 *   retransmit.c  how packets get across a wire that loses them
 *   wire.c        what the link runs over, and the faults that people set
 *   packet.h      what travels on it
 *   keepalive.c   connections that ask whether their peer is there
 *   wake.c        waking programs
 *   sleep.c       sleeping until somebody rings
 *   core.c        which core the NIC runs on, and when it keeps it
 *   control.c     the daemon
 *   segment.c     mapping shared memory by name
 *   log.c         what happened, a line an event
 *   crash.c       what is said of a NIC that dies of a signal
 *   own.h         what the NIC must remember, in shared memory that a successor maps
 */
#ifndef NIC_H
#define NIC_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "own.h"
#include "packet.h"
#include "vmmc_attach.h"
#include "vmmc_idle.h"
#include "vmmc_layout.h"

struct link;
struct endpoint;

/* Something that has packets for a link.  A member of its program's lane in the link at most once. */
struct work {
  struct work *next;
  struct link *queued; /* where it stands, NULL: nowhere */
  uint32_t lane; /* index of the program's endpoint */
  /* Emits packets while link_room() allows and its fair share lasts.  True: has more to say. */
  bool (*transmit)(struct work *work, struct link *link);
};

/* A connection's part that a successor rebuilds: one for each slot, beside struct connection. */
struct slot_work {
  struct work work;
  struct endpoint *endpoint;
  struct remote *remote;  /* mapping of the peer's segment, once data came from it */
  uint64_t last_event;    /* position + 1 of its newest entry in the event ring */
  uint64_t seen;          /* give_back.c: what the last sweep saw of its positions */
  uint64_t keepalive;     /* app_slot.keepalive as keepalive.c goes by it, 0: not watched; */
  uint32_t kept_alive;    /* and of which generation */
  uint32_t slot;
  uint32_t next_held;     /* the next slot of the list that it is in, + 1 */
  bool held;              /* in the endpoint's list of slots whose rings may have pages to give back */
  bool awaited;           /* it was welcomed, and its answer is counted on (connection.c) */
  bool recalled;          /* its peer was asked for credit that it does not use, since it last moved */
};

/* A command's likewise: one for each place in the command queue. */
struct command_work {
  struct work work;
  struct endpoint *endpoint;
  uint32_t place;
};

/* A program attached to this node. */
struct endpoint {
  uint32_t index, serial;
  int32_t pid;
  bool dying; /* its process is gone, or expelled: deliver, then free */
  bool gone;  /* its daemon says that its process is: what it left in memory is for NICs only */
  const char *volatile wrong; /* why it is to be detached, NULL: nothing.  May be set by a signal handler */
  volatile bool replaced;     /* its segment was not there and is private zeros now (dma.c) */
  bool complained;            /* the log has a line about nonsense in its segment: one is enough */
  char *app, *nic;
  int app_fd, nic_fd, own_fd; /* to commit pages */
  struct own *own;
  struct slot_work *work;            /* VMMC_SLOTS, sparse */
  struct command_work command[VMMC_COMMANDS];
  uint64_t last_send[VMMC_NODES_MAX]; /* index + 1 of the newest send to each node, 0: none */
  uint64_t commands_taken;           /* command_tail up to which commands were taken */
  uint32_t next_look;                /* word of dirty bits with which its next turn begins */
  bool vmmc_committed;               /* the tables that commands need are allocated */
  uint64_t events_committed;         /* bytes of the event ring that are */
  uint32_t first_held, first_swept;  /* lists of slots, + 1: give_back.c */
  int waker[VMMC_WAKERS];            /* event descriptors, -1: none */
  int memory;                        /* the program's memory, opened by itself, -1: none */
};

/* A peer's segment, mapped read-only to copy from. */
struct remote {
  struct remote *next;
  uint32_t node, serial;
  uint32_t references; /* connections that use it */
  bool gone;           /* its NIC said that the endpoint ended */
  char *app;
};

struct nic {
  char cluster[VMMC_NAME_MAX + 1];
  uint32_t uid, node, nodes, boot;
  struct vmmc_pub *pub;
  struct vmmc_door *door;
  struct node_state *state;
  int state_fd; /* to commit pages */
  struct endpoint *endpoint[VMMC_ENDPOINTS_MAX]; /* by index */
  uint32_t live[VMMC_ENDPOINTS_MAX];             /* indices in use, dense */
  uint32_t live_count;
  struct link *link[VMMC_NODES_MAX]; /* by node, made when they first talk */
  uint32_t lost[VMMC_NODES_MAX];     /* by node: its newest boot that is known to have lost its power, 0: none */
  struct link *busy_links;           /* links with something to transmit */
  struct link *unreliable_links;     /* links whose wire is not perfect, this way or that */
  struct remote *remotes;
  int control_fd;
};
extern struct nic nic;

/* Between two stores of which a successor may find the first without the second, never the other way
 * round.  Whoever maps the memory after a death finds all that the dead one had stored up to some point of
 * its program: only the compiler has to be kept from another order. */
static inline void in_order(void) { atomic_signal_fence(memory_order_seq_cst); }

/* ---- counters: one writer, so a plain load and store will do ---- */
#define COUNT_IN(counters, name, n)                                                                     \
  atomic_store_explicit(&(counters)->name, atomic_load_explicit(&(counters)->name, memory_order_relaxed) + (n), \
                        memory_order_relaxed)
#define COUNT_NODE(name, n) COUNT_IN(&nic.pub->counters, name, n)
#define COUNT(endpoint, name, n)                                  \
  do {                                                            \
    COUNT_NODE(name, n);                                          \
    COUNT_IN(&nic_header(endpoint)->counters, name, n);           \
  } while (0)

/* ---- main.c ---- */
void nic_start(int count, char **argument); /* ends the process when it cannot */
int nic_turn(void);                         /* each duty once; returns how much was done */
/* There is no memory for what must not be forgotten.  Its successor asks for it again: what a NIC has in memory of
 * its own may be lost with it, and only with it. */
__attribute__((noreturn)) void nic_end_for_memory(const char *what);
/* Somebody removed or truncated what the node's NICs remember: without it a successor would guess. */
__attribute__((noreturn)) void nic_end_damaged(const char *what);

/* ---- log.c ---- */
__attribute__((format(printf, 2, 3))) void log_event(const char *level, const char *format, ...);
int log_work(void); /* duty: counts of what was suppressed */
bool log_has_work(void);
void log_end(void); /* says what was suppressed: nobody will later */

/* ---- crash.c ---- */
void crash_start(void);
void crash_report(int signal_number, const void *address);
__attribute__((format(printf, 1, 2))) void crash_line(const char *format, ...); /* log.c: at once, unlimited */

/* ---- segment.c: NULL with errno set on failure ---- */
void *segment_map(uint32_t node, const char *what, uint64_t bytes, bool writable, int *fd_out);
void segment_end(uint32_t node, const char *what); /* removes it; who has it mapped keeps it */
void *segment_make(uint32_t node, const char *what, uint64_t bytes); /* opens it when it exists */

/* Allocates pages before anything is stored in them: a full /dev/shm is an error here, not a SIGBUS
 * there.  False: no room. */
bool segment_commit(int fd, uint64_t offset, uint64_t length);

/* ---- parts of an endpoint's segments ---- */
static inline struct vmmc_app_header *app_header(const struct endpoint *e) { return (void *)e->app; }
static inline struct vmmc_nic_header *nic_header(const struct endpoint *e) { return (void *)e->nic; }
static inline struct vmmc_app_slot *app_slot(const struct endpoint *e, uint32_t slot) {
  return (struct vmmc_app_slot *)(e->app + VMMC_APP_SLOTS) + slot;
}
static inline struct vmmc_nic_slot *nic_slot(const struct endpoint *e, uint32_t slot) {
  return (struct vmmc_nic_slot *)(e->nic + VMMC_NIC_SLOTS) + slot;
}
static inline char *default_buffer(const struct endpoint *e, uint32_t slot) {
  return e->nic + VMMC_NIC_RINGS + (uint64_t)slot * VMMC_RING;
}
static inline struct connection *connection_of(const struct endpoint *e, uint32_t slot) {
  return &e->own->connection[slot];
}

/* ---- endpoint.c ---- */
void endpoint_attach(uint32_t index, uint32_t serial, int32_t pid);
void endpoints_recover(void); /* those that a predecessor served */
void endpoint_detach(uint32_t index, uint32_t serial, bool may_live);
void endpoint_waker(uint32_t index, uint32_t serial, uint32_t number, int fd);
int endpoints_work(void);        /* duty: doorbells; returns how much was done */
bool endpoints_have_work(void);  /* looks only: before sleeping */
struct endpoint *endpoint_find(uint32_t index, uint32_t serial);
void endpoint_settle(struct endpoint *e); /* dying and nothing left: tell the daemon, forget */
/* The program wrote what cannot be: counted, and said in the log the first time. */
__attribute__((format(printf, 2, 3))) void endpoint_nonsense(struct endpoint *e, const char *format, ...);
struct remote *remote_find(uint32_t node, uint32_t serial); /* maps it when needed; NULL: cannot */
void remote_release(struct remote *remote);
void remote_gone(uint32_t node, uint32_t serial);
void remotes_renew(uint32_t node); /* that node has a new NIC */
void remotes_given_up(uint32_t node);

/* ---- port.c: 0 or an errno ---- */
int port_bind(struct endpoint *e, uint32_t slot, struct vmmc_address *address, uint32_t flags, uint32_t request);
int port_ephemeral(struct endpoint *e, uint32_t slot, struct vmmc_address *address, uint32_t flags);
int port_listen(struct endpoint *e, uint32_t slot);
void port_release(struct connection *c);
void port_accepted(const struct connection *c); /* a passive connection begins at its local port, */
void port_left(const struct connection *c);     /* and ends */
void ports_recover(void); /* once all endpoints are known */
struct binding *port_listener(const struct vmmc_address *to);
void port_welcome(const struct vmmc_address *to, uint64_t room); /* accepted there; so many more may come */
void port_unwelcome(uint16_t port);
uint32_t port_welcomes(const struct vmmc_pub *peer, const struct vmmc_address *to); /* connections that we may count on */

/* ---- connection.c ---- */
/* The app rang for this slot.  Returns how much work that was: a look, or as much as many. */
int connection_look(struct endpoint *e, uint32_t slot);
/* A passive one keeps others from its port, unless it is reset. */
bool connection_holds_port(struct endpoint *e, uint32_t slot);
void connection_end(struct endpoint *e, uint32_t slot); /* when the app has closed it, and nobody need hear of it */
void connection_abort(struct endpoint *e, uint32_t slot); /* resets it, both sides */
void connection_recover(struct endpoint *e, uint32_t slot); /* a successor takes it over */
void connection_unmake(struct endpoint *e, uint32_t slot);  /* before: if its predecessor had only begun it */
void connection_packet(struct link *link, const struct packet *p);
void connection_retell(struct endpoint *e, uint32_t slot); /* the peer's NIC is a new one */

void connections_given_up(struct endpoint *e, uint32_t node, int error, bool asking);

/* The app's half of a slot, read once.  Not the connection's generation: nothing written or read. */
struct half {
  uint64_t written, consumed;
  uint32_t shut; /* VMMC_SHUT_*, VMMC_CLOSED, VMMC_ABORT */
};
struct half connection_half(struct endpoint *e, uint32_t slot);
/* The default buffer begins anew when all in it is read, and at least `after` bytes came since it last did. */
void connection_rewind(struct endpoint *e, uint32_t slot, uint64_t after);
/* A listener's: up to which entries of its accept queue the app has taken them. */
uint64_t connection_entries_taken(struct connection *c, const struct half *h);
/* Stream position up to which bytes are read: consumed by the app, or at an address that it posted. */
uint64_t connection_read(const struct endpoint *e, uint32_t slot);
bool connection_credit_due(struct endpoint *e, uint32_t slot); /* there is enough to tell */
uint64_t connection_credit(struct endpoint *e, uint32_t slot); /* the limit to tell the peer now */
bool connection_transmit(struct work *work, struct link *link);
void connection_fail(struct endpoint *e, uint32_t slot, int error); /* the connection is dead */
void connection_abandon(struct endpoint *e, uint32_t slot, int error); /* the same, and its peer is told by a reset */
bool connection_commit(struct endpoint *e, uint32_t slot, uint64_t upto); /* its default buffer */
void connection_enqueue(struct endpoint *e, uint32_t slot);
bool connection_wants_to_say(struct endpoint *e, uint32_t slot, const struct half *h);
bool connection_wants_placed(struct endpoint *e, uint32_t slot, uint64_t end); /* with bytes up to `end`: ask */

/* ---- stream.c ---- */
void stream_transmit(struct endpoint *e, uint32_t slot, struct link *link, uint64_t written); /* a piece */
void stream_place(struct endpoint *e, uint32_t slot, const struct packet *p);
uint64_t stream_redirected(const struct packet *p);

/* ---- give_back.c ---- */
void give_back_later(struct endpoint *e, uint32_t slot);  /* the slot's rings have pages, to look at when idle */
void give_back_unused(struct endpoint *e, uint32_t slot); /* pages of the default buffer without a promise */
void give_back_recover(struct endpoint *e, uint32_t slot);
void give_back_from_dead(struct endpoint *e);             /* whose process is gone */
int give_back_work(void);                                 /* duty */
uint64_t give_back_due_ns(void);                          /* sleep no longer than until then; 0: no matter */

/* ---- redirect.c ---- */
struct redirection {                             /* one posted redirection, either kind */
  struct endpoint *endpoint;
  const _Atomic uint64_t *post;                  /* app's: generation, offset, length, position … */
  const uint64_t *offset, *length, *position;
  const uint64_t *space;                         /* NULL: the heap */
  _Atomic uint64_t *claim, *told, *from, *to;    /* NIC's */
  uint64_t claimed;                              /* generation held by this NIC now, 0: none */
};
struct redirection redirection_of_slot(struct endpoint *e, uint32_t slot);
struct redirection redirection_of_export(struct endpoint *e, uint32_t id);
struct place { /* where bytes go */
  char *at;       /* NULL: the default place */
  bool program;   /* an address in the program's own memory: for dma_copy_to_program */
};
/* How the bytes [at, at + length) begin: returns a run length and in *to where it goes.  Holds the claim
 * until redirect_done. */
uint64_t redirect_run(struct redirection *r, uint64_t at, uint64_t length, struct place *to);
/* Bytes of [at, at + length) that are posted for; a look that claims nothing. */
uint64_t redirect_covers(const struct redirection *r, uint64_t at, uint64_t length);
void redirect_copied(struct redirection *r, uint64_t upto); /* bytes before `upto` are there */
void redirect_done(struct redirection *r);                  /* after the position was published */
void redirect_recover(struct redirection *r, uint64_t placed);

/* ---- command.c ---- */
int commands_work(struct endpoint *e);
void commands_recover(struct endpoint *e);
void commands_given_up(struct endpoint *e, uint32_t node);
void command_begin(struct own_command *own); /* its effect is the next store: a successor knows it for its own */
void command_complete(struct endpoint *e, uint64_t index, int error, uint32_t id, uint64_t length,
                      uint32_t permissions);
void command_packet(const struct packet *p); /* answers to own commands */
void command_retell(struct endpoint *e, uint32_t node);

/* ---- export.c ---- */
int export_make(struct endpoint *e, struct own_command *own);
int export_end(struct endpoint *e, struct own_command *own);
void export_end_all(struct endpoint *e);
void export_answer(struct link *link, const struct packet *p); /* IMPORT of a peer */
int export_check(struct endpoint *e, const struct packet *p, uint32_t permission); /* errno or 0 */

/* ---- transfer.c ---- */
bool transfer_transmit(struct work *work, struct link *link);
void transfer_send_arrived(struct link *link, const struct packet *p);
void transfer_fetch_arrived(struct link *link, const struct packet *p);
void transfer_fetched(struct endpoint *e, const struct packet *p);
void transfer_recover(struct endpoint *e);

/* ---- utlb.c: 0, or EFAULT when a page of the range may not be touched ---- */
int utlb_translate(struct endpoint *e, uint64_t offset, uint64_t length);
bool utlb_present(struct endpoint *e, uint64_t offset, uint64_t length); /* all pages, and at least one; not cached */
void utlb_forget(uint32_t serial);

/* ---- dma.c: 0, or EFAULT when memory of either side is not there ---- */
void dma_start(void);
int dma_copy(void *to, const void *from, size_t length);
/* `memory` is a program's /proc/self/mem, `to` an address there.  EFAULT when some of it was not written. */
int dma_copy_to_program(int memory, const void *to, const void *from, size_t length);

/* ---- link.c ---- */
struct link *link_to(uint32_t node);               /* NULL with errno set: no such node */
bool link_room(const struct link *link);
struct packet *link_next(struct link *link);       /* the packet to fill; link_room() must hold */
void link_push(struct link *link);                 /* publishes it */
void link_reply(struct link *link, const struct packet *p); /* a packet that never waits for room */
void link_enqueue(struct link *link, struct work *work);
void link_forget(struct link *link, struct work *work); /* takes it out of this link's queue, if there */
int links_receive(void);
uint64_t links_due(void); /* when links_receive has something to do without being rung for; UINT64_MAX: never */                           /* duty */
int links_transmit(void);                          /* duty */
bool links_have_work(void);
void links_recover(void);
void links_lost_meanwhile(void);              /* before: what a predecessor had with nodes that lost their power */
void link_lost(uint32_t node, uint32_t boot); /* that node did, when it had been started so often */
void links_report(void);                      /* the newest packets, for a NIC that crashes */
uint32_t link_node(const struct link *link);
void link_wait_busy(struct link *link, struct endpoint *e, uint32_t slot); /* until RETRY comes */

/* While a packet is handled: its payload as the wire carried it, NULL: it is still where the sender has it; */
const char *link_carried(void);
/* and whether its sender has given it up meanwhile, so that what was copied from there is not to be believed. */
bool link_withdrawn(void);
/* What that end has said and the peer has not handled becomes nothing, since its memory is to be another's. */
void link_withdraw(uint32_t node, const struct packet_end *from);

uint32_t link_welcomes(uint32_t node, const struct vmmc_address *to); /* connections that may be shown before their answer */
uint64_t link_tail(const struct link *link);         /* packets published, */
uint64_t link_acknowledged(const struct link *link); /* and those that the peer's NIC is known to have handled */

/* ---- keepalive.c ---- */
void keepalive_watch(struct endpoint *e, uint32_t slot); /* when its program asks for it */
int keepalive_work(void);                                /* duty */
uint64_t keepalive_due(void);

/* ---- retransmit.c ---- */
int unreliable_links_work(void);     /* duty: what is due at a time */
uint64_t unreliable_links_due(void); /* when there is something next, CLOCK_MONOTONIC; UINT64_MAX: never */

/* ---- wire.c ---- */
void wire_set(const struct vmmc_control_wire *settings); /* the daemon's: from now on */

/* ---- wake.c: call after the state that matters is stored ---- */
enum { WAKE_READERS = 1, WAKE_WRITERS = 2, WAKE_BOTH = 3 };
void wake_slot(struct endpoint *e, uint32_t slot, int whom);
void wake_completion(struct endpoint *e);
void wake_notification(struct endpoint *e);
void wake_all(struct endpoint *e);                      /* whoever sleeps in that program, in any call */
void wake_waker(struct endpoint *e, uint32_t number);   /* an event descriptor */
bool wake_descriptor(int fd);                           /* one that is nobody's waker here; false: errno says why */
void wake_words(struct vmmc_nic_slot *slot);            /* whoever sleeps on a slot, asleep or not */
bool wake_is_harmless(int fd);                          /* is an event descriptor, and no other file */
bool wake_start(void);                                  /* false: no timer */

/* ---- sleep.c ---- */
void sleep_until_work(bool (*have_work)(void), uint64_t due_ns);
void sleep_not(void); /* from a signal handler: whoever is about to sleep looks again */

/* ---- core.c ---- */
void core_gave(struct endpoint *e); /* its program was given something that it may answer */
void core_woke(void);               /* and had to be woken for it */
void core_asked(void);              /* a program gave work: it answered, or began */
void core_opened(void);             /* a connection: those who make many take no turns */
void core_turn(struct vmmc_idle *idle); /* there was work: what to do when there is no more */

/* ---- control.c ---- */
void control_start(int fd);
int control_work(void);
bool control_has_work(void);
void control_say(uint32_t kind, uint32_t endpoint, uint32_t serial, int32_t value);

#endif
