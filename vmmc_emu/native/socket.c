/*
 * socket.c: a socket from socket() to its last close: its memory, its references, its end.
 *
 * A socket is made without anything in shared memory.  Threads in calls on it and its descriptors hold
 * references; the last one to go gives the slot back: the NIC delivers what was written, ends the
 * connection and frees the slot.
 *
 * Sockets lie in a pool whose memory is never unmapped, so that a stale pointer to one (from the event
 * ring, from a thread that lost a race with close) can always be read, and its references looked at.
 */
#include <string.h>
#include <sys/mman.h>

#include "connection.h"
#include "slot.h"

enum { POOL_CHUNK = 64 * 1024 };

static pthread_mutex_t pool_lock = PTHREAD_MUTEX_INITIALIZER;
static struct vsocket *pool_free;
_Atomic uint32_t socket_forks;

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
    pthread_mutex_init(&s->slot_lock, NULL);
    s->next_free = pool_free;
    pool_free = s;
  }
  return true;
}

/* A fork must find the locks free: its child may open sockets of its own. */
static void before_fork(void) {
  slots_before_fork();
  critical_lock(&pool_lock);
}

static void after_fork(void) {
  critical_unlock(&pool_lock);
  slots_after_fork();
}

static void after_fork_in_parent(void) {
  atomic_fetch_add_explicit(&socket_forks, 1, memory_order_relaxed);
  after_fork();
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork); }

struct vsocket *socket_new(int family) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, watch_forks);
  critical_lock(&pool_lock);
  struct vsocket *s = pool_free || pool_grow() ? pool_free : NULL;
  if (s) pool_free = s->next_free;
  critical_unlock(&pool_lock);
  if (!s) return NULL;

  s->next_free = NULL;
  s->family = family;
  s->endpoint = NULL;
  s->slot = s->generation = 0;
  s->has_slot = false;
  s->receive_timeout_ns = s->send_timeout_ns = 0;
  s->receive_buffer = s->send_buffer = 0;
  s->linger_s = -1;
  socket_used(s);
  s->bind_flags = s->flags = 0;
  s->error = 0;
  s->error_taken = 0;
  s->watch = s->exclusive = 0;
  s->readiness = NULL;
  memset(&s->local, 0, sizeof s->local);
  memset(&s->peer, 0, sizeof s->peer);
  s->bound = s->bound_address = s->control_busy = false;
  s->redirecting = NULL;
  s->closing = s->ended = s->shut = s->shutdowns = s->within_node = s->dissolved = s->local_asleep = 0;
  s->request = 0;
  s->low_water = 1;
  s->rung = s->outstanding = s->full_at = 0;
  memset(s->kept, 0, sizeof s->kept);
  *s->congestion = 0;
  s->phase = SOCKET_NEW;
  atomic_store_explicit(&s->references, 1, memory_order_relaxed);
  return s;
}

/* ---- close ---- */

static void end(struct vsocket *s) {
  if (atomic_exchange(&s->ended, 1) || !s->generation) return;
  if (!connection_usable(s)) return; /* a child of fork: the parent's connection goes on */
  if (atomic_load(&s->phase) == SOCKET_LISTENING) {
    connection_give_up(s, VMMC_CLOSED);
    return;
  }
  bool connected = connection_view(s).connected;
  if (connected) connection_said(s);
  uint32_t bits = connection_leave(s, s->linger_s == 0);
  if (s->forks != atomic_load_explicit(&socket_forks, memory_order_relaxed)) bits |= VMMC_FORKED;
  slot_leave(s, bits);
  if (s->linger_s > 0 && connected) /* until all is delivered, the time is over, or a handler ran */
    connection_await_nic(s, connection_deadline((uint64_t)s->linger_s * 1000000000u));
  slot_give_back(s);
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
  } while (!atomic_compare_exchange_weak_explicit(&s->references, &n, n - 1, memory_order_acq_rel,
                                                  memory_order_acquire));
  if (n != 1) return;
  critical_lock(&pool_lock);
  s->next_free = pool_free;
  pool_free = s;
  critical_unlock(&pool_lock);
}

/* ---- for the readiness layer ---- */

/* No reference is taken: whoever gave back the last one would end the socket, which may wait for its peer. */
void *socket_readiness_of_slot(struct endpoint *e, uint32_t slot) {
  struct vsocket *s = slot_holder(e, slot);
  return s ? atomic_load_explicit(&s->readiness, memory_order_acquire) : NULL;
}

void socket_set_watch(struct vsocket *s, uint64_t groups, uint64_t exclusive) {
  atomic_store(&s->exclusive, exclusive);
  atomic_store(&s->watch, groups);
  struct vmmc_app_slot *a = slot_hold(s);
  if (a) {
    /* In between the NIC may wake one too many or, of exclusive sets that came just now, one of them. */
    atomic_store(&a->exclusive, exclusive);
    atomic_store(&a->watch, groups);
  }
  slot_let_go(s);
}
