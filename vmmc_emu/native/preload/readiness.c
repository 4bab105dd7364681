/* readiness.c: sets, the event ring, and sleeping on both sockets and kernel descriptors.  See readiness.h. */
#include "readiness.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "process.h"
#include "real.h"

static pthread_mutex_t routes = PTHREAD_MUTEX_INITIALIZER;
/* Items out of use.  Never given back: a signal handler may close a socket, and free() is not for handlers. */
static struct item *unused_items; /* guarded by routes */
static uint32_t group_users[VMMC_GROUPS]; /* sets that use each wake group; guarded by routes */

void routes_take(void) { critical_lock(&routes); }
void routes_release(void) { critical_unlock(&routes); }

/* ---- sets ---- */

struct instance *set_new(void) {
  struct instance *set = calloc(1, sizeof *set);
  if (!set) return NULL;
  pthread_mutex_init(&set->lock, NULL);
  set->kick_fd = -1;
  return set;
}

void set_free(struct instance *set) {
  pthread_mutex_destroy(&set->lock);
  free(set->numbers);
  free(set);
}

/* Tells the NIC whether all who sleep on a group sleep in one set.  With routes held. */
static void group_tell(uint32_t g) {
  struct endpoint *e = endpoint_current();
  if (e) atomic_store(&app_header(e)->group[g].alone, group_users[g] == 1);
}

static void group_take(struct instance *set) {
  if (set->has_group) return;
  uint32_t best = 0; /* groups are shared when there are more sets than groups: costs idle wakes */
  for (uint32_t g = 1; g < VMMC_GROUPS; g++)
    if (group_users[g] < group_users[best]) best = g;
  group_users[best]++;
  group_tell(best); /* before a socket's watch says that the set hears of it */
  set->group = best;
  set->has_group = true;
}

/* Groups that want to hear of a file: of the sets it is in, and of the sets that those are in; and apart from
 * those the groups of which it is enough that one hears. */
struct groups {
  uint64_t each, one;
};
static void find_groups(const struct file *f, int depth, struct groups *groups) {
  if (depth > 5) return; /* the kernel nests no deeper either */
  for (const struct item *i = f->items; i; i = i->file_next) {
    if (i->set->has_group) *(i->events & EPOLLEXCLUSIVE ? &groups->one : &groups->each) |= 1ull << i->set->group;
    if (i->set->file) find_groups(i->set->file, depth + 1, groups);
  }
}

static void update_watch(struct file *f, int depth) {
  if (f->kind == FILE_SOCKET) {
    struct groups groups = {0, 0};
    find_groups(f, 0, &groups);
    socket_set_watch(f->socket, groups.each | groups.one, groups.one & ~groups.each);
  } else if (f->kind == FILE_EPOLL && depth <= 5) {
    for (uint32_t n = 0; n < f->set->numbers_size; n++)
      for (struct item *i = f->set->numbers[n]; i; i = i->number_next) update_watch(i->file, depth + 1);
  }
}

struct item *set_find(struct instance *set, int fd, struct file *f) {
  if ((uint32_t)fd >= set->numbers_size) return NULL;
  struct item *i = set->numbers[fd];
  while (i && i->file != f) i = i->number_next;
  return i;
}

int set_add(struct instance *set, int fd, struct file *f, const struct epoll_event *event) {
  if ((uint32_t)fd >= set->numbers_size) {
    uint32_t size = set->numbers_size ? set->numbers_size : 16;
    while (size <= (uint32_t)fd) size *= 2;
    struct item **numbers = realloc(set->numbers, size * sizeof(struct item *));
    if (!numbers) return -ENOMEM;
    memset(numbers + set->numbers_size, 0, (size - set->numbers_size) * sizeof(struct item *));
    set->numbers = numbers;
    set->numbers_size = size;
  }
  struct item *i = unused_items;
  if (i) unused_items = i->number_next;
  else if (!(i = malloc(sizeof *i))) return -ENOMEM;
  *i = (struct item){.set = set, .file = f, .fd = fd, .events = event->events, .data = event->data, .fresh = true,
                     .file_next = f->items, .number_next = set->numbers[fd]};
  set->numbers[fd] = i;
  f->items = i;
  group_take(set);
  atomic_fetch_add(&set->members, 1);
  update_watch(f, 0); /* before the caller looks whether it is ready: a change from here on is an event */
  return 0;
}

static void unlist(struct item *item) { /* with the set's lock held */
  if (!item->listed) return;
  struct instance *set = item->set;
  *(item->list_previous ? &item->list_previous->list_next : &set->first) = item->list_next;
  *(item->list_next ? &item->list_next->list_previous : &set->last) = item->list_previous;
  item->list_next = item->list_previous = NULL;
  item->listed = false;
  atomic_fetch_sub_explicit(&set->listed, 1, memory_order_relaxed);
}

static void enlist(struct item *item) { /* with the set's lock held */
  if (item->listed) return;
  struct instance *set = item->set;
  item->list_previous = set->last;
  *(set->last ? &set->last->list_next : &set->first) = item;
  set->last = item;
  item->listed = true;
  atomic_fetch_add_explicit(&set->listed, 1, memory_order_release);
}

void set_remove(struct item *item) {
  struct instance *set = item->set;
  struct file *f = item->file;
  struct item **at = &set->numbers[item->fd];
  while (*at != item) at = &(*at)->number_next;
  *at = item->number_next;
  for (at = &f->items; *at != item;) at = &(*at)->file_next;
  *at = item->file_next;
  critical_lock(&set->lock);
  unlist(item);
  critical_unlock(&set->lock);
  atomic_fetch_sub(&set->members, 1);
  update_watch(f, 0);
  item->number_next = unused_items;
  unused_items = item;
}

void set_remove_all(struct instance *set) {
  for (uint32_t n = 0; n < set->numbers_size; n++)
    while (set->numbers[n]) set_remove(set->numbers[n]);
  if (set->has_group) {
    group_users[set->group]--;
    group_tell(set->group);
  }
  set->has_group = false;
}

/* ---- waking ---- */

/* Event descriptors for threads that sleep in the kernel's poll.  A thread has one to itself while it
 * sleeps: one that several drained would wake only one of them. */
static struct {
  _Atomic uint64_t busy;       /* bit w: some thread has waker w */
  _Atomic int fd[VMMC_WAKERS]; /* number + 1; 0: not made yet */
  _Atomic uint32_t given[VMMC_WAKERS]; /* serial of the endpoint whose NIC has it, + 1 */
} wakers;

static __thread int sleeping_fd __attribute__((tls_model("initial-exec"))) = -1;

void readiness_signal(void) {
  if (sleeping_fd < 0) return;
  int error = errno;
  uint64_t one = 1;
  (void)!REAL(syscall)(SYS_write, sleeping_fd, &one, sizeof one);
  errno = error;
}

/* A waker's number, or -1: all are in use or none can be made. */
static int waker_take(struct endpoint *e) {
  uint64_t busy = atomic_load(&wakers.busy);
  int w;
  do {
    if (busy == UINT64_MAX) return -1;
    w = __builtin_ctzll(~busy);
  } while (!atomic_compare_exchange_weak(&wakers.busy, &busy, busy | 1ull << w));
  int fd = atomic_load(&wakers.fd[w]) - 1;
  if (fd < 0) {
    fd = endpoint_private_descriptor((int)REAL(syscall)(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (fd >= 0) atomic_store(&wakers.fd[w], fd + 1);
  }
  if (fd >= 0 && e && atomic_load(&wakers.given[w]) != e->serial + 1 &&
      endpoint_give_waker(e, (uint32_t)w, fd) == 0)
    atomic_store(&wakers.given[w], e->serial + 1);
  if (fd >= 0 && (!e || atomic_load(&wakers.given[w]) == e->serial + 1)) return w;
  atomic_fetch_and(&wakers.busy, ~(1ull << w));
  return -1;
}

static void waker_drain(int w) {
  uint64_t count;
  (void)!REAL(syscall)(SYS_read, atomic_load(&wakers.fd[w]) - 1, &count, sizeof count);
}

/* Wakes sleepers of the set for something that no NIC tells them of: one, or all. */
static void kick(struct instance *set, int count) {
  /* Before the look for sleepers: one that is about to announce itself finds it changed. */
  atomic_fetch_add(&set->kicks, 1);
  if (!atomic_load(&set->sleepers)) return;
  long woken = REAL(syscall)(SYS_futex, &set->kicks, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
  uint64_t one = 1;
  for (uint64_t left = atomic_load(&set->wakers); left && woken < count; left &= left - 1, woken++)
    (void)!REAL(syscall)(SYS_write, atomic_load(&wakers.fd[__builtin_ctzll(left)]) - 1, &one, sizeof one);
}

void set_kick(struct instance *set) { kick(set, INT_MAX); }

/* Something is left for others to report. */
static void pass_on(struct instance *set) {
  atomic_thread_fence(memory_order_seq_cst); /* listed before the look for sleepers, who look the other way round */
  if (atomic_load(&set->listed) && atomic_load(&set->sleepers)) kick(set, 1);
}

static void raise_item(struct item *item, bool with_kick, int depth) {
  struct instance *set = item->set;
  critical_lock(&set->lock);
  if (!item->disabled) enlist(item);
  critical_unlock(&set->lock);
  if (with_kick) kick(set, INT_MAX);
  if (set->file && depth < 5)
    for (struct item *i = set->file->items; i; i = i->file_next) raise_item(i, with_kick, depth + 1);
}

void set_raise(struct item *item, bool with_kick) { raise_item(item, with_kick, 0); }

void readiness_changed(struct file *f) {
  if (!f->items) return;
  routes_take();
  for (struct item *i = f->items; i; i = i->file_next) set_raise(i, true);
  routes_release();
}

/* ---- looking ---- */

/* The endpoint whose end (endpoint_detached) every set has been told of.  Changed with routes held. */
static _Atomic(struct endpoint *) end_told;

static bool end_is_news(struct endpoint *e) { return endpoint_detached(e) && atomic_load(&end_told) != e; }

static bool ring_has_entries(struct endpoint *e) {
  return e && (atomic_load_explicit(&nic_header(e)->events, memory_order_acquire) !=
                   atomic_load_explicit(&app_header(e)->events_taken, memory_order_relaxed) ||
               end_is_news(e));
}

static void raise_file(int fd, struct file *f, void *context) {
  (void)fd, (void)context;
  for (struct item *i = f->kind == FILE_SOCKET ? f->items : NULL; i; i = i->file_next) set_raise(i, true);
}

static void take_ring(struct endpoint *e) { /* with routes held */
  struct vmmc_app_header *app = app_header(e);
  const _Atomic uint32_t *ring = (const void *)(e->nic + VMMC_NIC_EVENTS);
  uint64_t taken = atomic_load_explicit(&app->events_taken, memory_order_relaxed);
  while (taken != atomic_load_explicit(&nic_header(e)->events, memory_order_acquire)) {
    uint32_t slot = atomic_load_explicit(&ring[taken % VMMC_EVENTS], memory_order_relaxed);
    /* seq_cst: taken before anybody reads the socket's state, so that a change after that reading finds
     * no untaken entry and enters it again. */
    atomic_store(&app->events_taken, ++taken);
    struct file *f = socket_readiness_of_slot(e, slot); /* not held: its items are ours to look at while we have routes */
    /* Without a kick: the NIC has woken one of the set's sleepers, or a sleeper's last look (under routes) will
     * see the list.  Where sets share a group it may have been just before they did: then it woke any one. */
    if (f)
      for (struct item *i = f->items; i; i = i->file_next) set_raise(i, group_users[i->set->group] > 1);
  }
  /* The NIC enters no more events: all sockets have one now. */
  if (!end_is_news(e)) return;
  atomic_store(&end_told, e);
  descriptor_walk(0, UINT32_MAX, raise_file, NULL);
}

bool set_stirs(struct instance *set) {
  return atomic_load_explicit(&set->listed, memory_order_acquire) || ring_has_entries(endpoint_current());
}

bool set_look(struct instance *set) {
  struct endpoint *e = endpoint_current();
  routes_take(); /* even when the ring is empty: another thread may be between taking and listing */
  if (e) take_ring(e);
  routes_release();
  return atomic_load_explicit(&set->listed, memory_order_acquire);
}

static bool set_is_ready(struct instance *set, int depth);

static uint32_t ready_of(struct file *f, int depth) {
  if (f->kind == FILE_SOCKET) return socket_ready(f->socket);
  return f->kind == FILE_EPOLL && depth < 5 && set_is_ready(f->set, depth + 1) ? EPOLLIN : 0;
}

uint32_t readiness_of(struct file *f) { return ready_of(f, 0); }

/* What epoll_wait would report of an item now; remembers nothing. */
static uint32_t would_report(struct item *item, struct socket_edges *edges, int depth) {
  bool is_socket = item->file->kind == FILE_SOCKET;
  if (item->disabled) return 0;
  /* The edges first: one that comes after is then reported once too often, not lost. */
  if (is_socket && item->events & EPOLLET) *edges = socket_edges(item->file->socket);
  uint32_t ready = ready_of(item->file, depth);
  if (ready & EPOLLIN) ready |= EPOLLRDNORM;
  if (ready & EPOLLOUT) ready |= EPOLLWRNORM;
  ready &= (item->events & 0xffff) | EPOLLERR | EPOLLHUP;
  if (ready && is_socket && item->events & EPOLLET && !item->fresh) {
    /* New bytes are no news to whom waits for room only, as in Linux; an end or an error is to everybody. */
    bool in = edges->in != item->edges.in &&
              (item->events & (EPOLLIN | EPOLLRDNORM | EPOLLRDBAND | EPOLLPRI) || ready & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
    bool out = edges->out != item->edges.out && item->events & (EPOLLOUT | EPOLLWRNORM);
    if (!in && !out) return 0;
  }
  return ready;
}

static bool set_is_ready(struct instance *set, int depth) {
  bool ready = false;
  struct socket_edges edges = {0, 0};
  critical_lock(&set->lock);
  for (struct item *i = set->first, *next; i && !ready; i = next) {
    next = i->list_next;
    if (would_report(i, &edges, depth)) ready = true;
    else unlist(i);
  }
  critical_unlock(&set->lock);
  return ready;
}

int set_harvest(struct instance *set, struct epoll_event *events, int room) {
  struct endpoint *e = endpoint_current();
  uint32_t looks = 0;
  int count = 0;
  bool fault = false;
  critical_lock(&set->lock);
  uint32_t left = atomic_load_explicit(&set->listed, memory_order_relaxed); /* each item once */
  while (left-- && count < room) {
    struct item *i = set->first;
    struct socket_edges edges = {0, 0};
    uint32_t ready = would_report(i, &edges, 0);
    looks++;
    unlist(i);
    if (!ready) continue;
    struct epoll_event event = {.events = ready, .data = i->data};
    if (!fault_copy(&events[count], &event, sizeof event)) { /* it is reported to who has room for it */
      enlist(i);
      fault = true;
      break;
    }
    count++;
    i->fresh = false;
    i->edges = edges;
    if (i->events & EPOLLONESHOT) i->disabled = true;
    else if (!(i->events & EPOLLET)) enlist(i); /* level-triggered: look again next time, after the others */
  }
  critical_unlock(&set->lock);
  if (looks && e) atomic_fetch_add_explicit(&app_header(e)->counters.epoll_looks, looks, memory_order_relaxed);
  pass_on(set); /* as the kernel does it, also for what is level-triggered and was just reported */
  if (!fault || count) return count;
  errno = EFAULT;
  return -1;
}

void set_clear_list(struct instance *set) {
  critical_lock(&set->lock);
  while (set->first) unlist(set->first);
  critical_unlock(&set->lock);
}

/* ---- sleeping ---- */

static _Atomic bool no_waitv; /* the kernel (or a sandbox) has no futex_waitv */

/* As a blocking call of the C library's: pthread_cancel ends it.  Nothing in this function needs cleaning up;
 * what does in its callers is cleaned up at the calls. */
__attribute__((noinline)) static long waitv(struct futex_waitv *words, unsigned count, const struct timespec *deadline) {
  int before;
  pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &before);
  long result = REAL(syscall)(SYS_futex_waitv, words, count, 0, deadline, CLOCK_MONOTONIC);
  int error = errno;
  pthread_setcanceltype(before, NULL);
  errno = error;
  return result;
}

static bool wait_on_words(struct instance *set, const _Atomic uint32_t *group, uint32_t group_value, uint32_t kicks,
                          uint64_t deadline_ns, struct wait_signals since) {
  struct futex_waitv words[3] = {
      {.uaddr = (uintptr_t)&set->kicks, .val = kicks, .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG},
      {.uaddr = (uintptr_t)&wait_self()->signals, .val = since.signals, .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG},
      {.uaddr = (uintptr_t)group, .val = group_value, .flags = FUTEX_32},
  };
  struct timespec deadline = {(time_t)(deadline_ns / 1000000000), (long)(deadline_ns % 1000000000)};
  long result = waitv(words, group ? 3 : 2, deadline_ns == WAIT_FOREVER ? NULL : &deadline);
  if (result < 0 && (errno == ENOSYS || errno == EPERM)) {
    atomic_store(&no_waitv, true);
    return false;
  }
  return true;
}

/* The daemon has hung up on an endpoint that is served as far as we know: the cluster has ended without us. */
static _Atomic bool hung_up;

static void wait_in_poll(struct endpoint *e, struct pollfd *kernel, nfds_t count, uint64_t deadline_ns,
                         struct wait_signals since, int waker) {
  struct pollfd *attach = NULL;
  /* All wakers in use (more than 64 threads sleep like this): look again every 10 ms. */
  uint64_t now = vmmc_now_ns(), limit = waker < 0 ? now + 10000000 : WAIT_FOREVER;
  if (deadline_ns < limit) limit = deadline_ns;
  uint64_t left = limit > now ? limit - now : 0;
  struct timespec timeout = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
  if (waker >= 0) {
    kernel[count++] = (struct pollfd){.fd = atomic_load(&wakers.fd[waker]) - 1, .events = POLLIN};
    sleeping_fd = kernel[count - 1].fd;
    atomic_signal_fence(memory_order_seq_cst); /* from here a handler writes to it: none is missed */
    /* A NIC that has no descriptor for the waker detaches us, and cannot wake us by it: the daemon hangs up. */
    if (e && !endpoint_detached(e) && !atomic_load_explicit(&hung_up, memory_order_relaxed)) {
      attach = &kernel[count++];
      *attach = (struct pollfd){.fd = e->attach_fd};
    }
  }
  if (wait_interrupted(since, true)) return;
  int ready = REAL(ppoll)(kernel, count, limit == WAIT_FOREVER ? NULL : &timeout, NULL);
  if (ready > 0 && attach && attach->revents && !endpoint_detached(e))
    atomic_store_explicit(&hung_up, true, memory_order_relaxed);
}

/* A thread's sleep in a set, to be undone when it is over, by a cancellation as well. */
struct set_sleeper {
  struct instance *set;
  struct vmmc_group_app *group; /* or NULL */
  int waker;                    /* or -1: it sleeps on words, or looks again by itself */
  bool returns;                 /* to look at the set; else it is cancelled, or left by longjmp */
};

static void set_awake(void *sleeper) {
  struct set_sleeper *s = sleeper;
  if (s->waker >= 0) {
    atomic_signal_fence(memory_order_seq_cst);
    sleeping_fd = -1;
    waker_drain(s->waker);
    atomic_fetch_and(&s->set->wakers, ~(1ull << s->waker));
    if (s->group) atomic_fetch_and(&s->group->wakers, ~(1ull << s->waker));
    atomic_fetch_and(&wakers.busy, ~(1ull << s->waker));
  } else if (s->group) {
    atomic_fetch_sub(&s->group->asleep, 1);
  }
  atomic_fetch_sub(&s->set->sleepers, 1);
  /* It may be the only one that was woken: what it was woken for is listed, and others look where it does not. */
  set_look(s->set);
  if (!s->returns) pass_on(s->set);
}

void set_sleep(struct instance *set, struct pollfd *kernel, nfds_t count, uint32_t kicks, uint64_t deadline_ns,
               struct wait_signals since) {
  struct pollfd none[SET_SLEEP_OURS];
  struct endpoint *e = endpoint_current();
  struct vmmc_group_app *group = e && set->has_group ? &app_header(e)->group[set->group] : NULL;
  const _Atomic uint32_t *word = group ? &nic_header(e)->group_wake[set->group] : NULL;
  bool on_words = !kernel && !atomic_load_explicit(&no_waitv, memory_order_relaxed);
  int waker = on_words ? -1 : waker_take(e);

  /* Announce, then look for the last time; the NIC changes, then looks for sleepers: both seq_cst. */
  uint32_t value = word ? atomic_load(word) : 0;
  critical_begin(); /* no handler that leaves by longjmp between the announcement and its record */
  atomic_fetch_add(&set->sleepers, 1);
  if (waker >= 0) {
    atomic_fetch_or(&set->wakers, 1ull << waker);
    if (group) atomic_fetch_or(&group->wakers, 1ull << waker);
  } else if (group) {
    atomic_fetch_add(&group->asleep, 1);
  }
  struct set_sleeper sleeper = {set, group, waker, false};
  AT_END(awake, set_awake, &sleeper);
  critical_end();
  if (!set_look(set) && !wait_interrupted(since, true) && atomic_load(&set->kicks) == kicks) {
    if (e) atomic_fetch_add_explicit(&app_header(e)->counters.app_sleeps, 1, memory_order_relaxed);
    if (on_words) wait_on_words(set, word, value, kicks, deadline_ns, since);
    else wait_in_poll(e, kernel ? kernel : none, kernel ? count : 0, deadline_ns, since, waker);
  }
  sleeper.returns = true;
}

/* ---- files that end or change sides ---- */

void readiness_forget(struct file *f) {
  if (f->kind == FILE_SOCKET) {
    atomic_store_explicit(&f->socket->readiness, NULL, memory_order_relaxed);
    if (!f->items) return;
  }
  routes_take();
  while (f->items) set_remove(f->items);
  if (f->kind == FILE_EPOLL) set_remove_all(f->set);
  routes_release();
  if (f->kind == FILE_EPOLL) {
    if (f->set->kick_fd >= 0) endpoint_private_close(f->set->kick_fd);
    set_free(f->set);
  }
}

/* Memberships on their way to the kernel's sets. */
struct epoll_move {
  struct epoll_move *next;
  struct instance *set;
  int fd;
  struct epoll_event event;
};

struct epoll_move *readiness_leave(struct file *f) {
  struct epoll_move *moved = NULL;
  routes_take();
  while (f->items) {
    struct item *i = f->items;
    struct epoll_move *m = i->set->file && file_try_hold(i->set->file) ? malloc(sizeof *m) : NULL;
    if (m) {
      *m = (struct epoll_move){moved, i->set, i->fd, {i->disabled ? 0 : i->events, i->data}};
      moved = m;
    }
    set_remove(i);
  }
  routes_release();
  return moved;
}

struct number_of {
  struct file *file;
  int fd;
};
static void find_number(int fd, struct file *f, void *context) {
  struct number_of *wanted = context;
  if (f == wanted->file) wanted->fd = fd;
}

void readiness_join_kernel(struct epoll_move *moved) {
  while (moved) {
    struct epoll_move *m = moved;
    moved = m->next;
    struct number_of epoll = {m->set->file, -1};
    descriptor_walk(0, UINT32_MAX, find_number, &epoll);
    if (epoll.fd >= 0 && REAL(epoll_ctl)(epoll.fd, EPOLL_CTL_ADD, m->fd, &m->event) == 0) {
      atomic_fetch_add(&m->set->kernel_members, 1);
      set_kick(m->set);
    }
    file_put(epoll.file);
    free(m);
  }
}

/* ---- fork ---- */

void readiness_fork_prepare(void) { pthread_mutex_lock(&routes); }
void readiness_fork_parent(void) { pthread_mutex_unlock(&routes); }

void readiness_fork_child(void) {
  routes = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
  memset(group_users, 0, sizeof group_users);
  unused_items = NULL; /* a child that ran no fork handler may have it half changed */
  /* The parent's wakers wake the parent: the child makes its own. */
  for (int w = 0; w < VMMC_WAKERS; w++) {
    atomic_store(&wakers.fd[w], 0);
    atomic_store(&wakers.given[w], 0);
  }
  atomic_store(&wakers.busy, 0);
  sleeping_fd = -1;
  atomic_store(&hung_up, false);
}
