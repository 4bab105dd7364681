/*
 * stream.c: a connection's bytes: send, receive, redirection of receives, readiness.
 *
 * Four positions move, each with one writer: `written` (we) follows the bytes into the transmit ring, and
 * is never more than SO_SNDBUF ahead of `acknowledged` (NIC: what the peer's NIC has); `placed` (NIC) follows
 * the bytes into the default buffer or to a redirected address; `consumed` (we) follows the reader.  Nothing
 * here asks the kernel for anything while there is room to write or something to read.  How much the peer
 * takes at a time (its credit) is the NICs' affair: the rest waits in the transmit ring.
 *
 * When the NIC must hear of `consumed`.  It tells the peer of new credit in quarters of the window, which is
 * never smaller than VMMC_LEAST_WINDOW (or SO_RCVBUF, when that is less) once a sender has used up what it had.
 * A reader rings when, since it last rang, it consumed a quarter of *that*, and has emptied the buffer or
 * consumed a quarter of the most that ever waited in it.  So a reader that finds the buffer empty has left
 * less than a quarter of the least window untold, and the NIC less than a quarter of the window: the sender,
 * all of whose bytes were consumed, has at least half a window of credit, and the two never wait for each
 * other.  A reader that leaves bytes in the buffer may leave more untold; it can read on, and rings when it has.
 */
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/single_threaded.h>

#include "connection.h"
#include "fault.h"
#include "heap.h"
#include "slot.h"
#include "sys.h"

enum {
  PUBLISH_CHUNK = 32768,             /* bytes after which a long send lets the NIC begin */
  RECEIVE_CHUNK = 65536,             /* what one copy out moves, all or nothing: a packet over Linux's loopback */
  CALL_BYTES_MAX = 0x7ffff000,       /* MAX_RW_COUNT: what one call moves at most, as on Linux */
};

/* ---- the program's memory, as a list of pieces ---- */

struct pieces {
  const struct iovec *vector;
  int count;
  size_t offset; /* in vector[0] */
};

static size_t pieces_length(const struct iovec *vector, int count) {
  size_t length = 0;
  for (int i = 0; i < count; i++) {
    if (vector[i].iov_len > CALL_BYTES_MAX - length) return CALL_BYTES_MAX;
    length += vector[i].iov_len;
  }
  return length;
}

/* The next contiguous piece, at most `most` bytes. */
static size_t pieces_next(struct pieces *p, size_t most, char **at) {
  while (p->offset == p->vector->iov_len) {
    p->vector++;
    p->offset = 0;
  }
  size_t left = p->vector->iov_len - p->offset;
  if (left > most) left = most;
  *at = (char *)p->vector->iov_base + p->offset;
  p->offset += left;
  return left;
}

/* Copies between a ring and the program's memory: all, or false: a piece is not there, and what was copied does
 * not count. */
static bool copy_to_ring(char *ring, uint64_t base, uint64_t position, struct pieces *from, size_t length) {
  struct pieces before = *from;
  while (length) {
    size_t offset = vmmc_ring_offset(position, base), run = VMMC_RING - offset;
    char *piece;
    run = pieces_next(from, length < run ? length : run, &piece);
    if (!fault_copy(ring + offset, piece, run)) {
      *from = before;
      return false;
    }
    position += run;
    length -= run;
  }
  return true;
}

/* The default buffer's bytes from `position` on, which are placed and not consumed. */
static bool copy_from_ring(const struct endpoint *e, uint32_t slot, uint64_t position, struct pieces *to, size_t length) {
  const char *ring = default_buffer(e, slot);
  /* relaxed: loaded after `placed`, with which the bytes were found */
  uint64_t base = atomic_load_explicit(&nic_slot(e, slot)->ring_base, memory_order_relaxed);
  struct pieces before = *to;
  while (length) {
    size_t offset = vmmc_ring_offset(position, base), run = VMMC_RING - offset;
    char *piece;
    run = pieces_next(to, length < run ? length : run, &piece);
    if (!fault_copy(piece, ring + offset, run)) {
      *to = before;
      return false;
    }
    position += run;
    length -= run;
  }
  return true;
}

/* Threads of this process share the endpoint's counters; a single one needs no locked instruction. */
static void count(_Atomic uint64_t *counter, uint64_t n) {
  if (__libc_single_threaded)
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + n,
                          memory_order_relaxed);
  else
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}
#define COUNT_APP(s, name, n) count(&app_header((s)->endpoint)->counters.name, n)

/* ---- send ---- */

static uint64_t ring_base(const struct vsocket *s) {
  return atomic_load_explicit(&app_slot(s->endpoint, s->slot)->ring_base, memory_order_relaxed);
}

static int commit_upto(struct vsocket *s, struct slot_memory *memory, uint64_t end) {
  char *ring = transmit_ring(s->endpoint, s->slot);
  int error = 0;
  end = (end + VMMC_PAGE - 1) / VMMC_PAGE * VMMC_PAGE;
  if (end > memory->committed_from + VMMC_RING) end = memory->committed_from + VMMC_RING;
  while (!error && memory->committed_to < end) { /* twice where the range goes around the ring's end */
    uint64_t offset = vmmc_ring_offset(memory->committed_to, ring_base(s)), run = VMMC_RING - offset;
    if (run > end - memory->committed_to) run = end - memory->committed_to;
    error = endpoint_commit(ring + offset, run, true);
    if (!error) memory->committed_to += run;
  }
  return error;
}

/* Ring pages up to position `end` exist before a byte is stored there: a full /dev/shm is ENOBUFS, not SIGBUS. */
static int commit_ring(struct vsocket *s, uint64_t end) {
  struct slot_memory *memory = slot_memory(s->endpoint, s->slot);
  uint64_t have = memory->committed_to - memory->committed_from;
  if (end <= memory->committed_to || have == VMMC_RING) return 0;
  /* Twice as much as before, or when memory is short what is needed now. */
  if (end < memory->committed_to + have && !commit_upto(s, memory, memory->committed_to + have)) return 0;
  return commit_upto(s, memory, end);
}

/* SO_SNDBUF: bytes that may wait for the peer's NIC. */
static uint64_t send_window(const struct vsocket *s) {
  return s->send_buffer && s->send_buffer < VMMC_RING ? s->send_buffer : VMMC_RING;
}

static uint64_t send_room(const struct vsocket *s) {
  /* acquire: the peer has copied what will be overwritten */
  uint64_t acknowledged = atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->acknowledged, memory_order_acquire);
  uint64_t written = atomic_load_explicit(&app_slot(s->endpoint, s->slot)->written, memory_order_relaxed);
  uint64_t end = acknowledged + send_window(s);
  return end > written ? end - written : 0;
}

/* As Linux has it, there is room again when a third of the buffer is free. */
static bool is_writable(const struct vsocket *s) { return send_room(s) >= send_window(s) / 3; }

/*
 * While `sending` is set the NIC leaves the ring's pages where they are: see "Idle rings" in vmmc_layout.h.
 * send_lock is held.  A NIC that was killed with the ring in its hand is waited for until its successor
 * gives it back.
 */
static void sending_begin(struct vsocket *s) {
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  struct timespec pause = { .tv_nsec = 20000 };
  uint32_t taken;
  for (int looks = 0;; looks++) {
    atomic_store_explicit(&a->sending, 1, memory_order_relaxed);
    /* The NIC's barrier does for both sides what a fence would do here. */
    atomic_signal_fence(memory_order_seq_cst);
    /* acquire: the pages are gone before ours are made */
    taken = atomic_load_explicit(&n->ring_taken, memory_order_acquire);
    if (__builtin_expect(taken % 2 == 0, 1)) break;
    atomic_store_explicit(&a->sending, 0, memory_order_relaxed);
    if (looks < 1000) {
      sched_yield();
    } else {
      sys_nanosleep(&pause);
      if (pause.tv_nsec < 5000000) pause.tv_nsec *= 2;
    }
  }
  struct slot_memory *memory = slot_memory(s->endpoint, s->slot);
  if (__builtin_expect(taken == memory->ring_taken, 1)) return;
  memory->ring_taken = taken;
  memory->committed_from = atomic_load_explicit(&a->written, memory_order_relaxed) / VMMC_PAGE * VMMC_PAGE;
  memory->committed_to = memory->committed_from;
}

static void sending_end(struct vsocket *s) {
  /* release: `written` before it, so that the NIC does not find the ring idle */
  atomic_store_explicit(&app_slot(s->endpoint, s->slot)->sending, 0, memory_order_release);
}

/* When nothing in the ring is wanted any more it begins anew: see "Rings" in vmmc_layout.h. */
static void rewind_ring(struct vsocket *s) {
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  struct slot_memory *memory = slot_memory(s->endpoint, s->slot);
  uint64_t base = ring_base(s), written = atomic_load_explicit(&a->written, memory_order_relaxed);
  uint64_t committed = memory->committed_to - memory->committed_from;
  if (written - base < VMMC_REWIND && committed) return;
  /* What is allocated has to lie where the ring begins. */
  if (committed && committed != VMMC_RING && memory->committed_from != base) return;
  /* acquire: the peer has copied what will be overwritten */
  if (atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->acknowledged, memory_order_acquire) != written) return;
  base = written / VMMC_PAGE * VMMC_PAGE;
  memory->committed_from = base;
  memory->committed_to = base + committed;
  /* relaxed: published by `written` */
  atomic_store_explicit(&a->ring_base, base, memory_order_relaxed);
}

/* Why nothing can be sent now, as tcp_sendmsg finds it: an error, or -EAGAIN.  0: send.  What was sent before
 * it is told first: then the error is the next call's, and not taken. */
static int send_obstacle(struct vsocket *s, size_t sent) {
  struct connection_view view = connection_view(s);
  if (__builtin_expect(view.dead || !view.connected, 0)) {
    int error = sent ? connection_pending_error(s) : connection_take_error(s);
    if (error) return -error;
    return view.connecting ? -EAGAIN : -EPIPE;
  }
  if (atomic_load_explicit(&s->shut, memory_order_relaxed) & VMMC_SHUT_WRITE) return -EPIPE;
  if (send_room(s)) return 0;
  /* A peer that has closed reads no more: there will be no room. */
  return view.status & VMMC_PEER_CLOSED ? -EPIPE : -EAGAIN;
}

static bool can_send(void *context) {
  struct connection_wait *w = context;
  struct vsocket *s = w->socket;
  if (connection_was_dissolved(s, w->dissolved)) return true;
  struct connection_view view = connection_view(s);
  if (view.connecting) return false;
  return view.dead || !view.connected || (view.status & VMMC_PEER_CLOSED) ||
         (atomic_load_explicit(&s->shut, memory_order_relaxed) & VMMC_SHUT_WRITE) || send_room(s);
}

/* Puts as many bytes as there is room for into the ring and tells the NIC.  send_lock is held. */
static ssize_t send_some(struct vsocket *s, struct pieces *from, size_t length) {
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  char *ring = transmit_ring(s->endpoint, s->slot);
  uint64_t room = send_room(s), written = atomic_load_explicit(&a->written, memory_order_relaxed);
  if (length > room) length = room;
  size_t left = length;
  int error = 0;
  sending_begin(s);
  rewind_ring(s);
  while (left) {
    size_t piece = left < PUBLISH_CHUNK + PUBLISH_CHUNK / 2 ? left : PUBLISH_CHUNK;
    error = commit_ring(s, written + piece);
    /* As in the kernel, what lies before the bad address in the same chunk is not sent either. */
    if (!error && !copy_to_ring(ring, ring_base(s), written, from, piece)) error = -EFAULT;
    if (error) break;
    written += piece;
    left -= piece;
    /* release: the bytes before the position */
    atomic_store_explicit(&a->written, written, memory_order_release);
    endpoint_ring_slot(s->endpoint, s->slot);
  }
  sending_end(s);
  connection_said(s);
  return error && left == length ? error : (ssize_t)(length - left);
}

/* Found without room: there will be some once the peer has so much. */
static void note_full(struct vsocket *s) {
  uint64_t window = send_window(s);
  uint64_t written = atomic_load_explicit(&app_slot(s->endpoint, s->slot)->written, memory_order_relaxed);
  uint64_t leaves_room = written + window / 3;
  atomic_store_explicit(&s->full_at, leaves_room > window ? leaves_room - window : 0, memory_order_relaxed);
}

ssize_t socket_send(struct vsocket *s, const struct iovec *vector, int count, int flags) {
  if (flags & MSG_OOB) return -EOPNOTSUPP;
  if (!connection_usable(s)) return -EBADF;
  socket_used(s);
  struct pieces from = { vector, count, 0 };
  size_t length = pieces_length(vector, count), sent = 0;
  uint64_t deadline = 0; /* read from the clock only when it is needed */
  struct connection_wait wait = connection_wait_begin(s);
  for (;;) {
    critical_lock(&s->send_lock);
    ssize_t n = connection_was_dissolved(s, wait.dissolved) ? -EPIPE : send_obstacle(s, sent);
    /* Nothing to send is not kept waiting. */
    if (n == 0 || (n == -EAGAIN && !length && connection_view(s).connected))
      n = send_some(s, &from, length - sent);
    if (n == -EAGAIN && s->generation) note_full(s);
    critical_unlock(&s->send_lock);
    if (n >= 0) {
      sent += (size_t)n;
      if (sent == length) {
        wait_self()->said = true;
        wait_worked(sent);
        return (ssize_t)sent;
      }
      continue;
    }
    if (n != -EAGAIN) return sent ? (ssize_t)sent : n;
    if (flags & MSG_DONTWAIT) return sent ? (ssize_t)sent : -EAGAIN;
    if (!deadline) deadline = connection_deadline(s->send_timeout_ns);
    struct wait_word words[SOCKET_WORDS];
    wait_self()->said = false;
    int waited = wait_until(words, socket_wait_words(s, false, true, words), can_send, &wait, deadline, wait.since,
                            sent || s->send_timeout_ns);
    if (waited) return sent ? (ssize_t)sent : waited == -ETIMEDOUT ? -EAGAIN : waited;
  }
}

/* ---- receive ---- */

/* What a reader sees, read in the order that makes end of file true. */
struct arrival {
  uint64_t waiting; /* bytes placed and not consumed */
  bool ended;       /* no more will come: end of file, an error, or our own shutdown */
};

static struct arrival arrival(const struct vsocket *s) {
  struct arrival a = { 0 };
  struct connection_view view = connection_view(s);
  if (!s->generation || view.connecting || !(view.connected || view.dead)) {
    a.ended = !view.connecting;
    return a;
  }
  /* acquire: the bytes are there when the position says so.  After the status: what END_OF_FILE speaks of
   * has been placed by now. */
  a.waiting = atomic_load_explicit(&nic_slot(s->endpoint, s->slot)->placed, memory_order_acquire) -
              atomic_load_explicit(&app_slot(s->endpoint, s->slot)->consumed, memory_order_relaxed);
  a.ended = view.dead || (view.status & VMMC_END_OF_FILE) ||
            (atomic_load_explicit(&s->shut, memory_order_relaxed) & VMMC_SHUT_READ);
  return a;
}

/* Why a reader that found nothing gets nothing, as tcp_recvmsg says it: 0 for end of file, an error
 * (taken), or -EAGAIN. */
static int receive_obstacle(struct vsocket *s) {
  struct connection_view view = connection_view(s);
  uint32_t phase = atomic_load_explicit(&s->phase, memory_order_relaxed);
  if (phase == SOCKET_LISTENING) return -ENOTCONN;
  if (view.status & VMMC_END_OF_FILE) return 0;
  int error = connection_take_error(s);
  if (error) return -error;
  if (view.dead || (atomic_load_explicit(&s->shut, memory_order_relaxed) & VMMC_SHUT_READ)) return 0;
  if (phase == SOCKET_NEW || phase == SOCKET_BOUND) return -ENOTCONN;
  return -EAGAIN;
}

/* The least window that the NIC gives: see the top of this file. */
static uint64_t least_window(const struct vsocket *s) {
  uint32_t buffer = s->receive_buffer;
  if (!buffer || buffer > VMMC_LEAST_WINDOW) return VMMC_LEAST_WINDOW;
  return buffer < VMMC_PAGE ? VMMC_PAGE : buffer;
}

static void tell_consumed(struct vsocket *s, uint64_t consumed) {
  s->rung = consumed;
  endpoint_ring_slot(s->endpoint, s->slot);
}

/* Bytes that a peek, or SO_RCVLOWAT, can wait for without reading: a sender can always send so many. */
static uint64_t patience(const struct vsocket *s) { return least_window(s) / 2; }

/* `n` more bytes are read.  receive_lock is held. */
static void consume(struct vsocket *s, uint64_t n) {
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  const struct vmmc_nic_slot *nic = nic_slot(s->endpoint, s->slot);
  uint64_t consumed = atomic_load_explicit(&a->consumed, memory_order_relaxed);
  uint64_t waiting = atomic_load_explicit(&nic->placed, memory_order_relaxed) - consumed;
  if (waiting > s->outstanding) s->outstanding = waiting;
  consumed += n;
  /* release: the bytes were copied out before the NIC may overwrite them */
  atomic_store_explicit(&a->consumed, consumed, memory_order_release);
  uint64_t untold = consumed - s->rung;
  if (untold < least_window(s) / 4 || (n < waiting && untold < s->outstanding / 4)) return;
  tell_consumed(s, consumed);
}

/* ---- redirection of a receive ---- */

struct redirected_receive {
  struct vsocket *socket;
  struct endpoint *endpoint; /* its slot, when the address was posted: */
  uint32_t slot, dissolved;  /* it may be another socket's once the connection was given up */
  struct wait_signals since; /* when the call began */
  uint64_t read;             /* bytes of this receive that are in place and consumed */
  bool has_some;             /* the call has moved bytes, of this receive or before it */
  char *destination;
  uint64_t offset, length; /* of the destination in the heap, held */
  uint64_t position;       /* stream position of its first byte */
  uint64_t generation;
  uint64_t target;         /* bytes that end the wait */
  uint64_t space;          /* enum vmmc_space */
  struct wait_undo undo;   /* as long as the address is posted, for a handler that leaves by longjmp */
};

/* The least receive into the program's own memory that the NIC writes: docs/performance.md has the figures. */
static _Atomic uint64_t program_least = UINT64_MAX; /* relaxed: a number that speaks for itself */

static void program_policy(void) {
  const char *text = getenv("VMMC_REDIRECT_ORDINARY");
  if (!text || !*text || !strcmp(text, "never")) return;
  char *end;
  errno = 0;
  unsigned long long bytes = strtoull(text, &end, 10);
  if (errno || *end || *text < '0' || *text > '9')
    fprintf(stderr, "vmmc: VMMC_REDIRECT_ORDINARY=%.64s is neither a number of bytes nor never: using never\n", text);
  else
    atomic_store_explicit(&program_least, bytes, memory_order_relaxed);
}

/*
 * May the NIC write [address, + length)?  It writes past the page protections, which a copy of ours would meet:
 * so they are asked for here.  That makes pages which the program may never need: few at a time.
 */
static bool program_hold(struct endpoint *e, char *address, uint64_t *length) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, program_policy);
  if (*length < atomic_load_explicit(&program_least, memory_order_relaxed) || !endpoint_give_memory(e)) return false;
  if (*length > VMMC_RING) *length = VMMC_RING;
  uintptr_t first = (uintptr_t)address / VMMC_PAGE * VMMC_PAGE;
  return sys_call(SYS_madvise, (long)first, (long)((uintptr_t)address + *length - first), MADV_POPULATE_WRITE, 0, 0,
                  0) == 0;
}

static void redirect_cancelled(void *context);

/* Posts the address, when the NIC reaches it.  receive_lock is held. */
static bool redirect_post(struct vsocket *s, struct redirected_receive *r, char *destination,
                          uint64_t length, uint64_t target, const struct connection_wait *wait, bool has_some) {
  r->space = VMMC_SPACE_HEAP;
  if (!heap_hold(s->endpoint, destination, length, &r->offset)) {
    if (!program_hold(s->endpoint, destination, &length)) return false;
    r->space = VMMC_SPACE_PROGRAM;
    r->offset = (uintptr_t)destination;
    if (target > length) target = length;
  }
  struct vmmc_app_slot *a = app_slot(s->endpoint, s->slot);
  r->socket = s;
  r->endpoint = s->endpoint;
  r->slot = s->slot;
  r->dissolved = wait->dissolved;
  r->since = wait->since;
  r->read = 0;
  r->has_some = has_some;
  r->destination = destination;
  r->length = length;
  r->target = target;
  r->position = atomic_load_explicit(&a->consumed, memory_order_relaxed);
  r->generation = ++slot_memory(s->endpoint, s->slot)->redirections;
  a->redirect_offset = r->offset;
  a->redirect_length = length;
  a->redirect_position = r->position;
  a->redirect_wake = r->position + r->target;
  a->redirect_space = r->space;
  s->redirecting = r;
  wait_undo_push(&r->undo, redirect_cancelled, r);
  COUNT_APP(s, redirections_posted, 1);
  /* release: the NIC that sees the generation sees what it stands for */
  atomic_store_explicit(&a->post, r->generation, memory_order_release);
  return true;
}

/* The connection was given up: nothing more comes, and the slot is not ours to look at. */
static bool redirect_dissolved(const struct redirected_receive *r) {
  return connection_was_dissolved(r->socket, r->dissolved);
}

static uint64_t redirect_consumed(const struct redirected_receive *r) {
  const struct vmmc_app_slot *a = app_slot(r->endpoint, r->slot);
  return atomic_load_explicit(&a->consumed, memory_order_relaxed);
}

/* Which of the bytes [at, end), all of them placed, went to the posted address: [*from, *to). */
static void redirect_told(const struct redirected_receive *r, uint64_t at, uint64_t end, uint64_t *from,
                          uint64_t *to) {
  const struct vmmc_nic_slot *nic = nic_slot(r->endpoint, r->slot);
  *from = *to = end;
  /* acquire: the NIC stores the bounds first and the generation that they belong to last */
  if (atomic_load_explicit(&nic->redirected_post, memory_order_acquire) != r->generation) return;
  uint64_t first = atomic_load_explicit(&nic->redirected_from, memory_order_relaxed);
  uint64_t last = atomic_load_explicit(&nic->redirected_to, memory_order_relaxed);
  if (first < at) first = at;
  if (last > end) last = end;
  if (first >= last) return; /* the run lies before or behind these */
  *from = first;
  *to = last;
}

/*
 * Reads what has been placed so far: what went to the default buffer is copied to where the rest already
 * is.  Also while the address stands: the NIC writes only behind `placed`, and the sender gets its room
 * back as it goes, so a receive may be longer than the ring.  receive_lock is held, and the connection is not
 * dissolved.
 */
static void redirect_progress(struct redirected_receive *r) {
  struct vsocket *s = r->socket;
  uint64_t at = redirect_consumed(r), end = at + arrival(s).waiting, from, to;
  if (end > r->position + r->length) end = r->position + r->length;
  if (end == at) return;
  r->has_some = true;
  redirect_told(r, at, end, &from, &to);
  struct iovec head = { r->destination + (at - r->position), from - at };
  struct iovec tail = { r->destination + (to - r->position), end - to };
  /* The memory was there when it was posted: a program that unmaps it in the middle of its own receive loses what
   * would lie in it, as it loses what the NIC wrote there. */
  (void)copy_from_ring(s->endpoint, s->slot, at, &(struct pieces){ &head, 1, 0 }, head.iov_len);
  (void)copy_from_ring(s->endpoint, s->slot, to, &(struct pieces){ &tail, 1, 0 }, tail.iov_len);
  uint64_t copied = head.iov_len + tail.iov_len;
  consume(s, end - at);
  r->read = end - r->position;
  if (!copied) return;
  COUNT_APP(s, bytes_copied, copied);
  /* Until the NIC hears that what came before the redirected run is read, it gives no credit for the run. */
  if (s->rung != end) tell_consumed(s, end);
}

/*
 * The NIC writes no more to the posted address, which was taken back: post = 0 and the look at `claim` are
 * seq_cst, as the NIC's claim and its second look at `post`, so one of the two sees the other.  The claim is
 * held for one copy; a NIC that was killed in it is waited for until its successor, which writes nothing,
 * clears it.  The generation is the slot's: no later holder's claim has the same.
 */
static void redirect_claim_wait(const struct redirected_receive *r) {
  const struct vmmc_nic_slot *n = nic_slot(r->endpoint, r->slot);
  struct timespec pause = { .tv_nsec = 20000 };
  for (int looks = 0; atomic_load(&n->claim) == r->generation; looks++) {
    if (looks < 1000) {
      sched_yield();
    } else {
      sys_nanosleep(&pause);
      if (pause.tv_nsec < 5000000) pause.tv_nsec *= 2;
    }
  }
}

/* Takes the posted address back; when the connection was given up that was done. */
static void redirect_withdraw(struct redirected_receive *r) {
  critical_lock(&r->socket->receive_lock);
  if (!redirect_dissolved(r)) atomic_store(&app_slot(r->endpoint, r->slot)->post, 0);
  critical_unlock(&r->socket->receive_lock);
  redirect_claim_wait(r);
}

void stream_give_up(struct vsocket *s) {
  struct redirected_receive *r = s->redirecting;
  if (!r) return;
  atomic_store(&app_slot(r->endpoint, r->slot)->post, 0);
  redirect_claim_wait(r);
  redirect_progress(r);
}

/* The receiver has nothing to do yet: all that came is where it belongs, and more is waited for.  Only it moves
 * `consumed`, so this needs no lock. */
static bool redirect_sleeps_on(const struct redirected_receive *r) {
  uint64_t at = redirect_consumed(r), end = at + arrival(r->socket).waiting, from, to;
  if (arrival(r->socket).ended || end - r->position >= r->target) return false;
  redirect_told(r, at, end, &from, &to);
  return end == at || (from == at && to == end);
}

static bool redirect_is_over(void *context) {
  struct redirected_receive *r = context;
  if (redirect_dissolved(r)) return true;
  /* What has moved bytes is ended by any handler, as on Linux: the call sees to it. */
  bool stops = r->has_some && wait_interrupted(r->since, true);
  if (!stops && redirect_sleeps_on(r)) return false;
  critical_lock(&r->socket->receive_lock);
  bool over = redirect_dissolved(r);
  if (!over) {
    redirect_progress(r);
    over = stops || redirect_consumed(r) - r->position >= r->target || arrival(r->socket).ended;
  }
  critical_unlock(&r->socket->receive_lock);
  return over;
}

/* After this nothing is written for this receive any more, and what was is read. */
static void redirect_end(struct redirected_receive *r, bool read_rest) {
  struct vsocket *s = r->socket;
  redirect_withdraw(r);
  critical_lock(&s->receive_lock);
  if (!redirect_dissolved(r)) {
    uint64_t at = redirect_consumed(r), end = at + arrival(s).waiting, from, to;
    redirect_told(r, at, end, &from, &to);
    /* Bytes that were redirected are nowhere else: they are read, if only by a thread that is cancelled. */
    if (read_rest || to > from) redirect_progress(r);
  }
  if (r->read < r->length) count(&app_header(r->endpoint)->counters.redirections_cancelled, 1);
  if (r->space == VMMC_SPACE_HEAP) heap_release(r->endpoint, r->offset, r->length);
  s->redirecting = NULL;
  wait_undo_pop(&r->undo); /* only now: the memory may be a stack frame that longjmp leaves */
  critical_unlock(&s->receive_lock);
  connection_wake_local(s); /* readers that had to wait for this one */
}

static void redirect_cancelled(void *context) { redirect_end(context, false); }

/* Waits with the address posted, then takes it back.  What wait_until says; *arrived bytes were read. */
__attribute__((noinline)) static int
redirect_wait(struct redirected_receive *r, uint64_t deadline, bool timed, uint64_t *arrived) {
  struct wait_word words[SOCKET_WORDS];
  volatile int waited = 0; /* the push may be a setjmp */
  int count = socket_wait_words(r->socket, true, false, words);
  pthread_cleanup_push(redirect_cancelled, r);
  waited = wait_until(words, count, redirect_is_over, r, deadline, r->since, timed);
  pthread_cleanup_pop(0);
  redirect_end(r, true);
  *arrived = r->read;
  return waited;
}

/* ---- the receive call ---- */

struct receive { /* one call */
  struct vsocket *socket;
  struct connection_wait wait;
  struct pieces to;
  size_t length, got;
  int flags;
  bool redirecting; /* `redirect` is posted */
  struct redirected_receive redirect;
};

/* Bytes that the call waits for.  Where waiting bytes stay in the buffer, no more than a sender can
 * always send. */
static uint64_t receive_target(const struct receive *r) {
  uint64_t left = r->length - r->got, target = r->socket->low_water;
  if (r->flags & MSG_WAITALL || target > left) target = left;
  bool reads_while_waiting = (r->flags & MSG_WAITALL) && !(r->flags & MSG_PEEK);
  if (!reads_while_waiting && target > patience(r->socket)) target = patience(r->socket);
  return target ? target : 1;
}

/* Copies out what is there: bytes that the call has got in all, or -EFAULT.  receive_lock is held. */
static ssize_t receive_some(struct receive *r, uint64_t waiting) {
  struct vsocket *s = r->socket;
  size_t length = r->length - r->got, done = 0;
  if (length > waiting) length = waiting;
  if (!length) return (ssize_t)r->got;
  uint64_t consumed = atomic_load_explicit(&app_slot(s->endpoint, s->slot)->consumed, memory_order_relaxed);
  if (r->flags & MSG_TRUNC) done = length; /* Linux, TCP: MSG_TRUNC throws the bytes away */
  while (done < length) {
    /* A chunk with a bad address in it stays in the buffer, as a packet does in the kernel. */
    size_t chunk = length - done < RECEIVE_CHUNK ? length - done : RECEIVE_CHUNK;
    if (!copy_from_ring(s->endpoint, s->slot, consumed + done, &r->to, chunk)) break;
    COUNT_APP(s, bytes_copied, chunk);
    done += chunk;
  }
  if (done && !(r->flags & MSG_PEEK)) consume(s, done);
  r->got += done;
  return r->got ? (ssize_t)r->got : -EFAULT;
}

/* Before the call sleeps: where a late byte may go straight to its place, that place is posted.  0, or what
 * ends the call: it could not take what waits.  receive_lock is held. */
static ssize_t receive_prepare(struct receive *r, uint64_t waiting) {
  if (r->flags & MSG_PEEK) return 0;
  if (r->to.count == 1 && r->length && !(r->flags & MSG_TRUNC)) {
    char *destination = (char *)r->to.vector->iov_base + r->to.offset;
    r->redirecting = redirect_post(r->socket, &r->redirect, destination, r->length - r->got,
                                   receive_target(r), &r->wait, r->got);
  }
  if (!r->redirecting && (r->flags & MSG_WAITALL) && waiting) { /* the sender may need the room */
    size_t before = r->got;
    ssize_t result = receive_some(r, waiting);
    if (r->got - before < waiting) return result;
  }
  return 0;
}

/* It would wait, at first sight, for as long as it takes, and has nothing to post for what will come. */
static bool receive_would_wait(const struct receive *r) {
  const struct vsocket *s = r->socket;
  if ((r->flags & MSG_DONTWAIT) || s->receive_timeout_ns || !s->generation || !r->length) return false;
  bool one = r->to.count == 1;
  if (one && heap_contains(s->endpoint, r->to.vector->iov_base)) return false;
  if (one && r->length >= atomic_load_explicit(&program_least, memory_order_relaxed)) return false;
  struct arrival a = arrival(s);
  return !a.waiting && !a.ended;
}

/* One look: bytes read, 0 at the end, -errno; -EAGAIN: nothing yet.  receive_lock is held. */
static ssize_t receive_look(struct receive *r) {
  struct vsocket *s = r->socket;
  if (s->redirecting) return -EAGAIN; /* what arrives is another thread's, which has its address posted */
  struct arrival a = arrival(s);
  bool nonblocking = r->flags & MSG_DONTWAIT;
  if (a.waiting && (nonblocking || a.ended || a.waiting >= receive_target(r))) return receive_some(r, a.waiting);
  if (a.ended) return r->got ? (ssize_t)r->got : receive_obstacle(s);
  ssize_t ended = nonblocking ? 0 : receive_prepare(r, a.waiting);
  return ended ? ended : -EAGAIN;
}

static bool can_receive(void *context) {
  struct receive *r = context;
  if (connection_was_dissolved(r->socket, r->wait.dissolved)) return true;
  critical_lock(&r->socket->receive_lock);
  bool taken = r->socket->redirecting;
  critical_unlock(&r->socket->receive_lock);
  if (taken) return false;
  struct arrival a = arrival(r->socket);
  uint64_t target = (r->flags & MSG_WAITALL) && !(r->flags & MSG_PEEK) ? 1 : receive_target(r);
  return a.ended || a.waiting >= target;
}

/* 0: look again; else the call's result when nothing was got. */
static int receive_wait(struct receive *r, uint64_t deadline) {
  struct vsocket *s = r->socket;
  bool any_handler = r->got || s->receive_timeout_ns || (r->flags & SOCKET_ANY_HANDLER);
  if (!r->redirecting) {
    struct wait_word words[SOCKET_WORDS];
    return wait_until(words, socket_wait_words(s, true, false, words), can_receive, r, deadline, r->wait.since,
                      any_handler);
  }
  uint64_t arrived;
  int waited = redirect_wait(&r->redirect, deadline, any_handler, &arrived);
  r->redirecting = false;
  r->got += arrived;
  r->to.offset += arrived;
  return waited;
}

ssize_t socket_receive(struct vsocket *s, const struct iovec *vector, int count, int flags) {
  if (flags & MSG_OOB) /* as Linux, when no urgent data is there: here it never is */
    return atomic_load_explicit(&s->phase, memory_order_relaxed) == SOCKET_LISTENING ? -ENOTCONN : -EINVAL;
  if (!connection_usable(s)) return -EBADF;
  socket_used(s);
  struct receive r = { .socket = s, .wait = connection_wait_begin(s), .to = { vector, count, 0 }, .flags = flags };
  r.length = pieces_length(vector, count);
  uint64_t deadline = 0; /* read from the clock only when it is needed */
  int late = -EAGAIN;
  if (wait_takes_turns() && receive_would_wait(&r)) wait_ahead();
  for (;;) {
    uint64_t target = receive_target(&r);
    size_t before = r.got;
    critical_lock(&s->receive_lock);
    ssize_t n = connection_was_dissolved(s, r.wait.dissolved) ? (r.got ? (ssize_t)r.got : -EPIPE) : receive_look(&r);
    critical_unlock(&s->receive_lock);
    if (n > 0) wait_worked((uint64_t)n);
    if (n != -EAGAIN) {
      wait_ahead_end();
      return n;
    }
    if (r.flags & MSG_DONTWAIT) {
      if (flags & MSG_DONTWAIT && !r.got && endpoint_let_nic_catch_up()) continue;
      return r.got ? (ssize_t)r.got : late;
    }
    if (!deadline) deadline = connection_deadline(s->receive_timeout_ns);
    bool redirected = r.redirecting;
    int waited = receive_wait(&r, deadline);
    if (!r.length && !connection_was_dissolved(s, r.wait.dissolved)) return 0; /* Linux: waits, whatever for, and looks no more */
    if (redirected && r.got - before >= target) return (ssize_t)r.got;
    bool stops = r.got && wait_interrupted(r.wait.since, true);
    if (!waited && !stops) continue;
    if (waited && r.got) return (ssize_t)r.got;
    /* Less than was waited for may be there: one more look, for anything. */
    r.flags |= MSG_DONTWAIT;
    late = waited == -ETIMEDOUT ? -EAGAIN : waited;
  }
}

/* ---- readiness ---- */

static bool is_readable(const struct vsocket *s, struct arrival a) {
  return a.waiting >= (s->low_water < patience(s) ? s->low_water : patience(s));
}

uint32_t socket_ready(struct vsocket *s) {
  if (!connection_usable(s)) return EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP;
  uint32_t phase = atomic_load_explicit(&s->phase, memory_order_acquire);
  if (phase == SOCKET_LISTENING && endpoint_detached(s->endpoint)) return EPOLLIN | EPOLLERR | EPOLLHUP;
  if (phase == SOCKET_LISTENING) return connection_accepts_waiting(s) ? EPOLLIN : 0;
  struct connection_view view = connection_view(s);
  uint32_t ready = connection_pending_error(s) ? EPOLLERR : 0;
  if (view.connecting) return ready;
  /* As tcp_poll, whose sk_shutdown is ours and the peer's together. */
  uint32_t shut = atomic_load_explicit(&s->shut, memory_order_relaxed);
  if (phase == SOCKET_NEW || phase == SOCKET_BOUND)
    return ready | EPOLLOUT | EPOLLHUP | (shut & VMMC_SHUT_READ ? EPOLLIN | EPOLLRDHUP : 0);
  if (view.status & VMMC_END_OF_FILE) shut |= VMMC_SHUT_READ;
  if (view.dead) shut |= VMMC_SHUT_READ | VMMC_SHUT_WRITE;
  if ((shut & VMMC_SHUT_READ) && (shut & VMMC_SHUT_WRITE)) ready |= EPOLLHUP;
  if (shut & VMMC_SHUT_READ) ready |= EPOLLIN | EPOLLRDHUP;
  if (is_readable(s, arrival(s))) ready |= EPOLLIN;
  if ((shut & VMMC_SHUT_WRITE) || (view.status & VMMC_PEER_CLOSED) || is_writable(s))
    ready |= EPOLLOUT;
  else
    note_full(s);
  return ready;
}

/*
 * An edge of EPOLLIN is each arrival.  An edge of EPOLLOUT is, as on Linux, not each bit of room but a third
 * of the buffer after the socket was found full: the number is odd once so much is acknowledged.
 * Multipliers keep apart what must not cancel out in the sum.
 */
struct socket_edges socket_edges(struct vsocket *s) {
  if (!s->generation || !connection_usable(s)) return (struct socket_edges){ 0, atomic_load(&s->phase) };
  const struct vmmc_nic_slot *n = nic_slot(s->endpoint, s->slot);
  struct connection_view view = connection_view(s);
  uint64_t shutdowns = atomic_load_explicit(&s->shutdowns, memory_order_relaxed);
  /* That a peer whose end had come reads no more either is no news: but to a writer that waits for room. */
  bool peer_closed = view.status & VMMC_PEER_CLOSED;
  uint64_t state = (view.status & ~(uint32_t)VMMC_PEER_CLOSED) * 0x9e3779b97f4a7c15u + shutdowns * 0xc2b2ae3d27d4eb4fu;
  uint64_t full_at = atomic_load_explicit(&s->full_at, memory_order_relaxed);
  bool room_since = atomic_load_explicit(&n->acknowledged, memory_order_acquire) >= full_at;
  return (struct socket_edges){
    .in = atomic_load_explicit(&n->placed, memory_order_acquire) + state,
    .out = full_at * 2 + (room_since || peer_closed) + state,
  };
}
