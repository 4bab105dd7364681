/*
 * vmmc_layout.h: the shared memory that programs, NICs and observers agree on.
 *
 * Every structure here lies in a POSIX shared-memory segment.  Each field has one writer, named in
 * its comment ("app" is the library in an attached program, "NIC" the firmware of the node).  What
 * two processes write never shares a cache line.  Everything the app writes is hostile to the NIC:
 * it copies once, checks the copy and uses the copy.
 *
 * State that moves is a 64-bit position in a byte stream, stored and never added to by a reader, so
 * a command seen twice or a copy done again by a successor changes nothing.  A doorbell only says
 * "look".
 *
 * Segments, all named /vmmc.<uid>.<cluster>.node<i>.<what>:
 *
 *   ep<serial>.app   written by the app, mapped by its own NIC (read-write) and by peers' NICs (read)
 *   ep<serial>.nic   written by the app's NIC, mapped by the app read-only
 *   ep<serial>.own   written by the app's NIC, mapped by nobody else (nodes/nic/own.h)
 *   pub              written by the node's NIC, mapped by its apps, other NICs and observers read-only
 *   door             the node's doorbell for other NICs: written by NICs only
 *   state            written by the node's NIC, mapped by nobody else
 *   link.node<j>     written by this node's NIC: the queue of packets to node j
 */
#ifndef VMMC_LAYOUT_H
#define VMMC_LAYOUT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define VMMC_LAYOUT_VERSION 2u
#define VMMC_MAGIC 0x636d6d76u /* "vmmc" */

#define VMMC_LINE 64 /* bytes in a cache line */
#define VMMC_PAGE 4096

/* ---- limits ------------------------------------------------------------------------------------ */

enum {
  VMMC_NODES_MAX = 1024,
  VMMC_ENDPOINTS_MAX = 1024,   /* endpoints on a node at one time */
  VMMC_ACTIVE_SLOTS = 16384,   /* socket slots that the app allocates: [0, ACTIVE) */
  VMMC_SLOTS = 32768,          /* the NIC allocates [ACTIVE, SLOTS), for connections it accepts */
  VMMC_RING = 1024 * 1024,     /* bytes of a socket's transmit ring and of its default buffer */
  VMMC_FIRST_WINDOW = 4096,    /* bytes that a new connection's sender may send, and a long idle one's */
  VMMC_REWIND = 16384,         /* bytes after which an empty ring begins anew, see "Rings" */
  VMMC_LEAST_WINDOW = 16384,   /* what the window becomes, at least, as soon as a sender has used it up */
  VMMC_COMMANDS = 256,         /* VMMC commands outstanding in one endpoint */
  VMMC_EXPORTS = 1024,         /* buffers that one endpoint may export at a time */
  VMMC_NOTIFICATIONS = 1024,   /* notifications that wait to be taken */
  VMMC_GROUPS = 64,            /* wake groups of one endpoint: sets of sockets that somebody sleeps on */
  VMMC_WAKERS = 64,            /* event descriptors of one endpoint's sleeping threads */
  VMMC_MEMORY = 64,            /* the descriptor after those: the program's memory, its /proc/self/mem */
  VMMC_EVENTS = 65536,         /* entries of the event ring; more than VMMC_SLOTS */
  VMMC_WELCOMES = 256,         /* addresses at which peers may count on a node to accept */
  VMMC_NAME_MAX = 32,          /* bytes of an export's or a cluster's name, without a final NUL */
};

#define VMMC_HEAP_BYTES (1ull << 30) /* what vmmc_alloc hands out, committed as it is pinned */
#define VMMC_HEAP_PAGES (VMMC_HEAP_BYTES / VMMC_PAGE)

/* ---- addresses ---------------------------------------------------------------------------------- */

/* Always 16 bytes: an IPv4 address is kept as ::ffff:a.b.c.d.  family says how to show it. */
struct vmmc_address {
  uint8_t ip[16];
  uint16_t port;   /* host order */
  uint16_t family; /* AF_INET or AF_INET6, 0 none */
};

/* ---- the app's side of a socket ------------------------------------------------------------------ */

/* What a request asks of the NIC.  The answer comes in vmmc_nic_slot.reply. */
enum vmmc_request {
  VMMC_REQUEST_NONE,
  VMMC_REQUEST_BIND,    /* take a port: local (port 0: any); answer in nic_slot.local */
  VMMC_REQUEST_LISTEN,  /* accept connections on the bound port (binds first when unbound); backlog */
  VMMC_REQUEST_CONNECT, /* to peer on node peer_node; answered as soon as it is under way; the
                           outcome is VMMC_CONNECTED or an error in nic_slot.status */
};

/* vmmc_app_slot.bind_flags */
enum {
  VMMC_BIND_REUSEADDR = 1,
  VMMC_BIND_REUSEPORT = 2,
  VMMC_BIND_V6ONLY = 4, /* an AF_INET6 wildcard that does not take IPv4 too */
};

/* vmmc_app_slot.redirect_space */
enum vmmc_space {
  VMMC_SPACE_HEAP,    /* the app segment's heap */
  VMMC_SPACE_PROGRAM, /* the program's own memory, through the descriptor VMMC_MEMORY */
};

/* vmmc_app_slot.shut */
enum {
  VMMC_SHUT_WRITE = 1, /* nothing will be written past `written`: the NIC sends end of file after it */
  VMMC_SHUT_READ = 2,
  VMMC_CLOSED = 4, /* the app is done with the slot; the NIC delivers what is written, then frees it */
  VMMC_ABORT = 8,  /* with VMMC_CLOSED: reset the connection instead (SO_LINGER of zero) */
  VMMC_FORKED = 16, /* with VMMC_CLOSED: the program forked and left the reading to its child, which cannot:
                       bytes that nobody read are no reason to reset the connection */
  VMMC_ABORT_AT_END = 32, /* should the program end as it is, VMMC_ABORT with it: SO_LINGER of zero.  Set and taken back
                             by the option */
};

/*
 * A slot belongs to one socket at a time, told apart by a generation.  An active slot's generation is
 * raised by the app when it takes the slot; a passive slot's by the NIC when it accepts.  Each side
 * ignores the other's half of the slot unless both halves carry the same generation, except for
 * vmmc_nic_slot.state, which tells the app when an active slot is free again.
 *
 * The app fills its half first (all positions zero), stores `generation` last, and then rings.
 */
/* After so many seconds of silence the peer is asked whether it is there; again, so often, after each interval. */
#define VMMC_KEEPALIVE(idle_s, interval_s, count) ((uint64_t)(count) << 32 | (uint64_t)(interval_s) << 16 | (idle_s))

struct vmmc_app_slot {
  /* line 0: the request, a mailbox of one.  Writer: app. */
  _Alignas(VMMC_LINE) _Atomic uint32_t request; /* raised by one for each request, never reset */
  _Atomic uint32_t generation;                  /* 0: the app does not hold this slot */
  uint32_t op;                                  /* enum vmmc_request */
  uint16_t bind_flags;                          /* VMMC_BIND_* */
  uint16_t peer_node;                           /* CONNECT: index of the peer's node */
  struct vmmc_address local; /* BIND, LISTEN, CONNECT: own address; port 0: the NIC chooses */
  struct vmmc_address peer; /* CONNECT */
  uint32_t backlog;         /* LISTEN */
  _Atomic uint32_t receive_window; /* SO_RCVBUF in bytes, 0: the default; the NIC caps credit by it */

  /* line 1: transmit.  Writer: app. */
  _Alignas(VMMC_LINE) _Atomic uint64_t written; /* stream position up to which bytes lie in the ring; at
                                                   most the send window past nic_slot.acknowledged */
  _Atomic uint32_t shut;                        /* VMMC_SHUT_*; only VMMC_ABORT_AT_END is ever taken back in
                                                   a generation */
  _Atomic uint32_t asleep_tx;                   /* threads that sleep on nic_slot.wake_tx */
  _Atomic uint32_t sending;                     /* 1: a thread stores into the ring, see "Idle rings" */
  _Atomic uint32_t send_window;                 /* SO_SNDBUF in bytes, 0: the default (VMMC_RING) */
  _Atomic uint64_t keepalive;                   /* SO_KEEPALIVE: VMMC_KEEPALIVE(…), 0: off */
  _Atomic uint64_t wanted;                      /* stream position up to which nic_slot.acknowledged is to be told
                                                   as soon as the peer has the bytes, not in steps */
  _Atomic uint64_t ring_base;                   /* stream position at the ring's begin, see "Rings" */

  /* line 2: receive.  Writer: app. */
  _Alignas(VMMC_LINE) _Atomic uint64_t consumed; /* stream position up to which the app has read */
  _Atomic uint64_t watch;                        /* bit g: a change matters to wake group g */
  _Atomic uint64_t exclusive;                    /* of those: it is enough to wake one of these (EPOLLEXCLUSIVE) */
  _Atomic uint32_t asleep_rx;                    /* threads that sleep on nic_slot.wake_rx */

  /* line 3: redirection, see "Redirection" below.  Writer: app. */
  _Alignas(VMMC_LINE) _Atomic uint64_t post; /* generation of the posted redirection, 0: none */
  uint64_t redirect_offset;                  /* where to: an offset or address in redirect_space */
  uint64_t redirect_length;
  uint64_t redirect_position; /* stream position of the first byte that goes to redirect_offset */
  uint64_t redirect_space;    /* enum vmmc_space */
  uint64_t redirect_wake;     /* stream position before which the receiver need not be woken, see below */
};

/* ---- the NIC's side of a socket ------------------------------------------------------------------ */

enum vmmc_state { /* vmmc_nic_slot.state */
  VMMC_FREE,      /* not in use (an active slot may be taken by the app) */
  VMMC_IDLE,      /* taken, perhaps bound */
  VMMC_LISTENING,
  VMMC_CONNECTING, /* request sent, or the peer's backlog is full */
  VMMC_ESTABLISHED,
  VMMC_DEAD, /* reset, refused or unreachable: status has the errno */
};

/* vmmc_nic_slot.status: low 16 bits an errno (0: none), above it flags.  Stored after the position
 * that it speaks of: a reader that sees END_OF_FILE loads `placed` again before it believes it. */
enum {
  VMMC_ERRNO_MASK = 0xffff,
  VMMC_END_OF_FILE = 1 << 16, /* nothing will be placed past `placed` */
  VMMC_PEER_CLOSED = 1 << 17, /* the peer reads no more either */
  VMMC_CONNECTED = 1 << 18,   /* was established, whatever came after */
};

struct vmmc_nic_slot {
  /* line 0: identity and answers.  Writer: NIC. */
  _Alignas(VMMC_LINE) _Atomic uint32_t reply; /* newest request that is answered */
  int32_t reply_error;                        /* errno of that answer, 0: granted */
  _Atomic uint32_t generation;
  _Atomic uint32_t state; /* enum vmmc_state */
  struct vmmc_address local, peer;
  uint32_t peer_node;

  /* line 1: transmit.  Writer: NIC. */
  _Alignas(VMMC_LINE) _Atomic uint64_t acknowledged; /* stream position up to which the peer's NIC has the bytes:
                                                 their places in the ring are free.  Told in steps, so that it
                                                 may lag by a quarter of the send window, behind app_slot.wanted */
  _Atomic uint64_t transmitted;               /* handed to the link */
  _Atomic uint32_t wake_tx;                   /* changed when something that a writer, connector or
                                                 requester waits for happened and asleep_tx was set */
  _Atomic uint32_t ring_taken;                /* odd: the NIC takes the ring's pages back now; raised by two
                                                 whenever it may have, see "Idle rings" */

  /* line 2: receive.  Writer: NIC. */
  _Alignas(VMMC_LINE) _Atomic uint64_t placed; /* stream position up to which bytes have arrived */
  _Atomic uint32_t status;
  _Atomic uint32_t wake_rx; /* changed when a reader's condition may have and asleep_rx was set */
  _Atomic uint64_t ring_base; /* stream position at the default buffer's begin, see "Rings" */

  /* line 3: redirection.  Writer: NIC. */
  _Alignas(VMMC_LINE) _Atomic uint64_t claim; /* generation of the redirection it is copying into, or 0 */
  _Atomic uint64_t redirected_post;           /* generation that the next two speak of */
  _Atomic uint64_t redirected_from;           /* bytes [from, to) went to the posted address; */
  _Atomic uint64_t redirected_to;             /* all others to the default buffer */
};

/*
 * A listening socket's stream carries its accepted connections: an entry of 8 bytes each, in its
 * default buffer.  `placed` and `consumed` work as for data.
 */
struct vmmc_accept_entry {
  uint32_t slot;
  uint32_t generation;
};

/*
 * Redirection (sockets and exports alike).
 *
 * post:   the app writes offset, length and position, then `post` = a generation never used before
 *         on this slot (release).
 * claim:  before each copy the NIC reads `post`; when it covers the bytes to come, the NIC stores
 *         `claim` = that generation and loads `post` again (both seq_cst).  If post still stands, it
 *         copies there and stores redirected_from/to before `placed`; then claim = 0 (release).
 * cancel: the app stores post = 0 and loads claim until it is not that generation (both seq_cst: one
 *         of the two sides must see the other's store).  Then nothing can still be written, and
 *         [redirected_from, min(redirected_to, placed)) of redirected_post == generation tells what
 *         went there.  A NIC that died while it held a claim writes no more; its successor first
 *         lowers redirected_to to placed and then clears the claim.
 *
 * Bytes at their posted address are read: once those before the run are consumed, the NIC gives credit up to
 * the end of the run as if the app had consumed it, and wakes no reader before `redirect_wake`.  So a large
 * receive costs the receiver one wake, and the app stores `consumed` when the receive ends.
 *
 * Into the program's own memory the NIC writes through a descriptor that the program opened on itself.  It
 * names the memory and not the process: when the process has ended or called exec, a write finds nothing,
 * whoever has its pid.  What cannot be written there goes to the default buffer.
 *
 * The bytes that were redirected are one run, since bytes are placed in order: those before it went
 * to the default buffer (posted in the middle), those after it as well (the redirection was full).
 */

/*
 * Rings.  Byte p of a stream lies in its ring at (p - ring_base) mod VMMC_RING.  An empty ring begins anew after
 * VMMC_REWIND bytes: its side moves ring_base up to the page of the next byte.  So whatever a connection moved in its
 * life, as long as its ends keep up with each other it touches a few pages, which stay in the caches.
 *
 *   transmit ring:  the app moves ring_base when all of `written` is acknowledged, before it stores the next bytes and
 *                   then `written` (release).  The NIC loads it after `written`; it cannot have moved once more, since
 *                   what the NIC is about to transmit is not acknowledged.  Packets say where their bytes lie.
 *   default buffer: the NIC moves ring_base when it finds `consumed` (acquire) at `placed`, before it stores the next
 *                   bytes and then `placed` (release).  The app loads it after `placed`, when there is something to
 *                   read, and so nothing that would let the NIC move it.  That of a listener never moves.
 */
static inline uint64_t vmmc_ring_offset(uint64_t position, uint64_t ring_base) {
  return (position - ring_base) % VMMC_RING;
}

/*
 * Idle rings.  A connection that was idle for a while keeps no pages of its transmit ring: its NIC takes
 * them, since it knows when nothing has moved and wakes nobody for it.  The app must not be storing there:
 *
 *   app, to send:  sending = 1; look at ring_taken, while it is odd: sending = 0 and wait.  When it is another
 *                  than last time, none of the ring's pages count as committed.  Store bytes, `written`, then
 *                  sending = 0 (release).
 *   NIC, to take:  ring_taken odd; a barrier in all threads of the program (membarrier, for which the library
 *                  registers: vmmc_app_header.barriers); then, only if sending is 0 and all of `written` (read
 *                  after it) is acknowledged: takes the pages; ring_taken even (release).
 *
 * The app's first two steps need no fence: each of its threads passes the barrier either behind its sending = 1,
 * which the NIC then sees, or before it, and then the thread sees the odd number.  A successor makes odd ones
 * even.  The pages of default buffers are the NIC's own: it takes what lies outside [consumed, limit told).
 */

/* ---- VMMC commands -------------------------------------------------------------------------------- */

enum vmmc_op {
  VMMC_OP_NOP,
  VMMC_OP_EXPORT,   /* export_id, offset, length, permissions, node (or VMMC_ANY_NODE), name */
  VMMC_OP_UNEXPORT, /* export_id */
  VMMC_OP_IMPORT,   /* node, name; or, when name is empty, export_id as VMMC_EXPORT_NUMBER makes it, since
                       ids repeat among a node's endpoints: answer import id, length, permissions */
  VMMC_OP_UNIMPORT, /* import_id */
  VMMC_OP_SEND,     /* import_id, offset (own heap), length, remote_offset, flags */
  VMMC_OP_FETCH,    /* the same the other way: remote memory to own heap, needs read permission */
};

enum { /* vmmc_command.permissions */
  VMMC_PERMIT_WRITE = 1,
  VMMC_PERMIT_READ = 2,
};
enum { /* vmmc_command.flags */
  VMMC_SEND_NOTIFY = 1,
  VMMC_SEND_MORE = 2, /* a piece of a transfer that the library cut, and not the last: no send arrives with it */
};
#define VMMC_ANY_NODE 0xffffffffu
#define VMMC_EXPORT_NUMBER(endpoint, id) ((endpoint) * VMMC_EXPORTS + (id)) /* an export of a node */

/* One command, at index % VMMC_COMMANDS.  Writer: app. */
struct vmmc_command {
  _Alignas(VMMC_LINE) uint64_t index; /* position of this command: stored so that a check can compare */
  uint32_t op;
  uint32_t flags;
  uint64_t offset; /* in the app segment's heap */
  uint64_t length;
  uint64_t remote_offset; /* in the exported buffer */
  uint32_t import_id;
  uint32_t export_id;
  uint32_t node;
  uint32_t permissions;
  uint32_t tag; /* SEND with NOTIFY: handed to the receiver */
  char name[VMMC_NAME_MAX];
  /* SEND with NOTIFY: this is the last piece of a transfer of so many bytes, which the library cut to
   * stay within its bound of pinned memory: the notification speaks of all of it.  0: of this send */
  uint64_t notify_length;
};

/* The answer to the command of that index, at index % VMMC_COMMANDS.  Writer: NIC. */
struct vmmc_completion {
  _Alignas(VMMC_LINE) _Atomic uint64_t done; /* index + 1 of the command that this answers (release) */
  int32_t error;                             /* errno, 0: done */
  uint32_t id;                               /* IMPORT: import id */
  uint64_t length;                           /* IMPORT: bytes exported; SEND, FETCH: bytes moved */
  uint32_t permissions;                      /* IMPORT */
};

/*
 * A redirection posted on an export.  Where a socket's counts stream positions, this one counts
 * offsets in the exported buffer: [redirect_position, + redirect_length) goes to redirect_offset
 * instead, as one ascending run: it begins with the first byte that arrives inside that range, and
 * goes on with sends that continue where the run ends; a send elsewhere goes to the buffer.
 * Writer: app.
 */
struct vmmc_app_export {
  _Alignas(VMMC_LINE) _Atomic uint64_t post;
  uint64_t redirect_offset;
  uint64_t redirect_length;
  uint64_t redirect_position;
};

/* Writer: NIC. */
struct vmmc_nic_export {
  _Alignas(VMMC_LINE) _Atomic uint64_t claim;
  _Atomic uint64_t redirected_post;
  _Atomic uint64_t redirected_from;
  _Atomic uint64_t redirected_to;
  _Atomic uint64_t received;  /* bytes that have arrived in this export, in all */
  _Atomic uint64_t arrivals;  /* sends that have arrived in this export, in all */
  uint64_t last_offset;       /* of the newest send that arrived whole */
  uint64_t last_length;
};

/* At position % VMMC_NOTIFICATIONS.  Writer: NIC. */
struct vmmc_notification {
  uint64_t offset, length; /* what arrived, in the exported buffer */
  uint32_t export_id;
  uint32_t node; /* whose send it was */
  uint32_t tag;
  uint32_t sender; /* serial of the sending endpoint */
};

/*
 * UTLB: one entry a heap page, written by the app when it pins a page (the page is committed before
 * the entry is made valid) and cleared before it is unpinned.  The NIC caches entries; a page without
 * a valid entry is not touched by any send, fetch or export (EFAULT).
 */
enum { VMMC_UTLB_VALID = 1 };

/* ---- counters ------------------------------------------------------------------------------------- */

/* X(name, meaning): counted by the NIC, one set a node and one an endpoint. */
#define VMMC_NIC_COUNTERS(X)                                                        \
  X(sends, "VMMC sends and socket writes that the NIC took up")                     \
  X(bytes_sent, "bytes handed to links")                                            \
  X(bytes_received, "bytes placed in this node's memory")                           \
  X(bytes_redirected, "bytes placed straight at a posted address")                  \
  X(bytes_default, "bytes placed in default buffers")                               \
  X(notifications, "notifications delivered")                                       \
  X(packets_sent, "packets handed to links, first transmissions")                   \
  X(packets_received, "packets taken from links in order")                          \
  X(packets_resent, "packets transmitted again")                                    \
  X(packets_dropped, "packets dropped: duplicates, corrupt, stale or out of order") \
  X(wire_dropped, "packets to this node that a wire lost")                          \
  X(wire_corrupted, "packets to this node in which a wire flipped bits")            \
  X(wire_duplicated, "packets to this node that a wire doubled")                    \
  X(wire_reordered, "packets to this node that a wire held back")                   \
  X(timeouts, "times that a link's retransmission timer ran out")                   \
  X(peers_given_up, "times that a peer was given up as unreachable")                \
  X(commands_rejected, "commands answered with an error")                           \
  X(utlb_hits, "translations found in the NIC's cache")                             \
  X(utlb_misses, "translations fetched from an endpoint's table")                   \
  X(utlb_evictions, "translations pushed out of the NIC's cache")                   \
  X(connections_opened, "connections established, either side")                     \
  X(connections_refused, "connection requests refused by this node")                \
  X(connections_welcomed, "connects answered before the peer's NIC had seen them")  \
  X(wakes, "sleeping programs woken")                                               \
  X(sleeps, "times the NIC went to sleep")

/* Counted by the library, one set an endpoint. */
#define VMMC_APP_COUNTERS(X)                                                           \
  X(bytes_copied, "bytes the receiving library copied out of default buffers")         \
  X(fork_closed_sockets, "sockets that a fork left closed in the child")               \
  X(exec_closed_sockets, "sockets that an exec closed")                                \
  X(utlb_pins, "pages pinned")                                                         \
  X(utlb_unpins, "pages unpinned to stay within the bound")                            \
  X(redirections_posted, "redirections posted")                                        \
  X(redirections_cancelled, "redirections cancelled before they were full")            \
  X(epoll_looks, "sockets that calls of epoll_wait looked at, of all those watched")     \
  X(app_sleeps, "times a thread of the program slept in a socket or VMMC call")

#define VMMC_COUNTER_FIELD(name, meaning) _Atomic uint64_t name;
struct vmmc_nic_counters {
  VMMC_NIC_COUNTERS(VMMC_COUNTER_FIELD)
};
struct vmmc_app_counters {
  VMMC_APP_COUNTERS(VMMC_COUNTER_FIELD)
};

/* One set a link, in the segment of the NIC that counts. */
#define VMMC_LINK_COUNTERS(X)                                                        \
  /* of the wire that leads here: what it did */                                     \
  X(wire_changes, "times that the wire became another")                              \
  X(wire_packets, "packets that entered the wire, acknowledgements included")        \
  X(wire_dropped, "packets that the wire lost")                                      \
  X(wire_corrupted, "packets in which the wire flipped bits")                        \
  X(wire_duplicated, "packets that the wire doubled")                                \
  X(wire_reordered, "packets that the wire held back")                               \
  X(corrupt_found, "packets refused because their checksum was wrong")               \
  X(duplicates_found, "packets refused because they were there already")             \
  /* of the link that leads away */                                                  \
  X(packets_resent, "packets transmitted again")                                     \
  X(timeouts, "times the retransmission timer ran out")                              \
  X(given_up, "times the peer was given up as unreachable")                          \
  X(round_trip_ns, "round trip, smoothed; 0: not measured")                          \
  X(timeout_ns, "the retransmission timer's present time; 0: not measured")

struct vmmc_link_counters {
  VMMC_LINK_COUNTERS(VMMC_COUNTER_FIELD)
};

/* How the segment link.node<j> begins: for observers.  The rest is the NICs' own. */
struct vmmc_link_header {
  uint32_t magic, version; /* writer: the NIC whose node the segment is of */
  uint32_t peer_boot;      /* vmmc_pub.boot of the peer that it was made to speak to */
  _Alignas(VMMC_LINE) struct vmmc_link_counters counters;
};

/* ---- headers ------------------------------------------------------------------------------------- */

/*
 * Dirty bits, two levels: the app sets the slot's bit in `dirty`, then the word's bit in `summary`;
 * the NIC exchanges a summary word for 0, then each dirty word for 0, then reads the slots.  All of
 * it seq_cst: the app's store of a position comes before its look at the bit, the NIC's clearing of
 * the bit before its look at the position.
 */
enum {
  VMMC_DIRTY_WORDS = VMMC_SLOTS / 64,
  VMMC_SUMMARY_WORDS = VMMC_DIRTY_WORDS / 64,
};

struct vmmc_group_app { /* writer: app */
  _Atomic uint64_t wakers; /* bit w: a thread sleeps on event descriptor w for this group */
  _Atomic uint32_t asleep; /* threads that sleep on nic_header.group_wake[g] */
  _Atomic uint32_t alone;  /* 1: all of them wait in one set: an event needs to wake one of them */
};

struct vmmc_app_header {
  uint32_t magic, version; /* writer: app, once */
  int32_t pid;
  char command[20]; /* for ps and logs: the program's name, not trusted */
  uint32_t barriers; /* 1: the process is registered for membarrier: idle rings may be taken back */

  /* the endpoint's doorbell.  Set by app, cleared by NIC (idempotent: a lost clear costs a look) */
  _Alignas(VMMC_LINE) _Atomic uint64_t summary[VMMC_SUMMARY_WORDS];
  /* Raised, and woken (futex), when pub.asleep was found set after the bits.  The sleeping NIC waits for
   * it to change: a wake alone could come between the NIC's last look and its sleep.  Writer: app */
  _Alignas(VMMC_LINE) _Atomic uint32_t bell;
  _Atomic uint32_t cpu; /* on which the thread ran that gave the NIC work last: a hint */
  /* commands.  Writer: app */
  _Alignas(VMMC_LINE) _Atomic uint64_t command_tail; /* commands posted */
  _Atomic uint32_t asleep_completion;                /* threads that sleep on nic_header.wake_completion */
  /* events.  Writer: app */
  _Alignas(VMMC_LINE) _Atomic uint64_t events_taken; /* entries of the event ring that are handled */
  _Atomic uint64_t notifications_taken;
  _Atomic uint32_t asleep_notification;
  _Alignas(VMMC_LINE) struct vmmc_group_app group[VMMC_GROUPS];
  _Alignas(VMMC_LINE) struct vmmc_app_counters counters;
};

struct vmmc_nic_header {
  uint32_t magic, version; /* writer: NIC (the daemon makes the segment) */
  uint32_t node, endpoint, serial;
  _Atomic uint32_t ready; /* 1: the NIC serves this endpoint */
  /* 1: it does so no more, though the program lives; `why` says why.  2: there is no NIC any more, and who took it
   * away is the writer.  Stored before the sleepers are woken */
  _Atomic uint32_t detached;
  char why[VMMC_LINE + 36];

  /* Event ring: slots whose readiness changed and whose `watch` was not 0.  A slot that stands in it
   * untaken is not entered again.  Writer: NIC */
  _Alignas(VMMC_LINE) _Atomic uint64_t events; /* entries written */
  _Alignas(VMMC_LINE) _Atomic uint64_t commands_taken;
  _Atomic uint32_t wake_completion;
  _Alignas(VMMC_LINE) _Atomic uint64_t notifications; /* written */
  _Atomic uint32_t wake_notification; /* changed, when asleep_notification is set, for a notification and
                                         whenever bytes arrived in an export (redirections wait for it) */
  _Alignas(VMMC_LINE) _Atomic uint32_t group_wake[VMMC_GROUPS];
  _Alignas(VMMC_LINE) struct vmmc_nic_counters counters;
};

/* ---- the node's own segments ----------------------------------------------------------------------- */

struct vmmc_pub { /* writer: NIC */
  uint32_t magic, version;
  uint32_t node, nodes;
  uint32_t boot; /* how often the node was started: it loses its memory in between */
  _Atomic uint32_t incarnation; /* raised by each NIC process that takes the node over */
  _Atomic int32_t nic_pid; /* 0: the node has lost its power; then who took it away is the writer */
  _Atomic uint32_t retiring; /* serial of the endpoint whose counters are just being added to `retired`, 0: none */
  /* 1 while the NIC sleeps or is about to: whoever gives it work then raises and wakes a bell: an app
   * the one of its endpoint, a NIC the one of the door.  Readers order their own store before the load
   * of it with a seq_cst fence. */
  _Alignas(VMMC_LINE) _Atomic uint32_t asleep;
  _Atomic uint32_t cpu; /* on which the NIC ran last: a hint */
  _Alignas(VMMC_LINE) _Atomic uint64_t turns; /* of the NIC's duty cycle that are over: read by who waits for a few */
  _Alignas(VMMC_LINE) struct vmmc_nic_counters counters; /* all of the node, endpoints gone included */
  _Alignas(VMMC_LINE) struct vmmc_app_counters retired;  /* of endpoints that are gone */
  /* Where the node accepted last, by port, and how many more connections the listener takes: see nodes/nic/port.c.
   * Read by peers' NICs. */
  _Alignas(VMMC_LINE) _Atomic uint64_t welcome[VMMC_WELCOMES];
  /* serial of the endpoint at each index, 0: none: for observers */
  _Alignas(VMMC_LINE) _Atomic uint32_t endpoint[VMMC_ENDPOINTS_MAX];
};

/* Written by all NICs: bit i set: look at the link with node i. */
struct vmmc_door {
  _Alignas(VMMC_LINE) _Atomic uint64_t summary;
  _Atomic uint32_t bell; /* as vmmc_app_header.bell */
  _Alignas(VMMC_LINE) _Atomic uint64_t link[VMMC_NODES_MAX / 64];
};

/* ---- where things lie in a segment ------------------------------------------------------------------ */

#define VMMC_APP_DIRTY 16384ull
#define VMMC_APP_COMMANDS (VMMC_APP_DIRTY + VMMC_DIRTY_WORDS * 8)
#define VMMC_APP_EXPORTS (VMMC_APP_COMMANDS + VMMC_COMMANDS * sizeof(struct vmmc_command))
#define VMMC_APP_UTLB (1ull << 20) /* VMMC_HEAP_PAGES bytes, one a page */
#define VMMC_APP_SLOTS (8ull << 20)
#define VMMC_APP_HEAP (1ull << 30)
#define VMMC_APP_RINGS (2ull << 30) /* transmit ring of slot i at + i * VMMC_RING */
#define VMMC_APP_BYTES (VMMC_APP_RINGS + (uint64_t)VMMC_SLOTS * VMMC_RING)

#define VMMC_NIC_COMPLETIONS 16384ull
#define VMMC_NIC_EXPORTS (VMMC_NIC_COMPLETIONS + VMMC_COMMANDS * sizeof(struct vmmc_completion))
#define VMMC_NIC_NOTIFICATIONS (VMMC_NIC_EXPORTS + VMMC_EXPORTS * sizeof(struct vmmc_nic_export))
#define VMMC_NIC_EVENTS (1ull << 20) /* VMMC_EVENTS uint32_t, the slot each */
#define VMMC_NIC_SLOTS (8ull << 20)
#define VMMC_NIC_RINGS (2ull << 30) /* default buffer of slot i at + i * VMMC_RING */
#define VMMC_NIC_BYTES (VMMC_NIC_RINGS + (uint64_t)VMMC_SLOTS * VMMC_RING)

_Static_assert(sizeof(struct vmmc_app_slot) == 4 * VMMC_LINE, "four lines: request, transmit, receive, redirection");
_Static_assert(sizeof(struct vmmc_nic_slot) == 4 * VMMC_LINE, "four lines: answers, transmit, receive, redirection");
_Static_assert(sizeof(struct vmmc_app_header) <= VMMC_APP_DIRTY, "the header fits before the dirty words");
_Static_assert(VMMC_APP_EXPORTS + VMMC_EXPORTS * sizeof(struct vmmc_app_export) <= VMMC_APP_UTLB, "no overlap");
_Static_assert(VMMC_APP_UTLB + VMMC_HEAP_PAGES <= VMMC_APP_SLOTS, "no overlap");
_Static_assert(VMMC_APP_SLOTS + VMMC_SLOTS * sizeof(struct vmmc_app_slot) <= VMMC_APP_HEAP, "no overlap");
_Static_assert(sizeof(struct vmmc_nic_header) <= VMMC_NIC_COMPLETIONS, "no overlap");
_Static_assert(VMMC_NIC_NOTIFICATIONS + VMMC_NOTIFICATIONS * sizeof(struct vmmc_notification) <= VMMC_NIC_EVENTS, "no overlap");
_Static_assert(VMMC_NIC_SLOTS + VMMC_SLOTS * sizeof(struct vmmc_nic_slot) <= VMMC_NIC_RINGS, "no overlap");

#endif
