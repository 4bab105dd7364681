/* poll.c: poll, select and their like over VMMC sockets and any other descriptors. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "fault.h"
#include "process.h"
#include "readiness.h"
#include "real.h"

enum {
  KERNEL_LOOK = 16, /* polls (vmmc_idle.polls) for each look into the kernel */
  ON_STACK = 256,   /* descriptors of one call that need no allocation */
  WORDS = 16,       /* what wait_until takes */
};

/* One call under way. */
struct look {
  struct pollfd *set; /* the program's */
  nfds_t count;
  struct file **files;   /* of each entry, held; NULL: the kernel's */
  struct pollfd *kernel; /* the kernel's part, entries of ours with -1; room for SET_SLEEP_OURS more */
  nfds_t ours, theirs, nested;
  uint32_t dissolved; /* connections of ours that were given up before the look, in all: see own_words */
  bool tells_closed; /* poll: of a number that was closed meanwhile; select knows no such answer */
};

/* What poll reports of one of ours. */
static short report(struct file *f, short wanted) {
  if (f == &file_forked) return POLLNVAL;
  uint32_t ready = readiness_of(f);
  if (ready & POLLIN) ready |= POLLRDNORM;
  if (ready & POLLOUT) ready |= POLLWRNORM;
  return (short)(ready & ((uint16_t)wanted | POLLERR | POLLHUP));
}

/* What has woken a sleeper is the file that it began with; what it is told is of the number, as in the kernel. */
static short report_number(struct file *f, const struct pollfd *asked) {
  short events = report(f, asked->events);
  bool is_closed = events && !descriptor_peek(asked->fd) && REAL(fcntl)(asked->fd, F_GETFD) < 0;
  return is_closed ? POLLNVAL : events;
}

static int look_at_ours(struct look *look) {
  int ready = 0;
  for (nfds_t i = 0; i < look->count; i++) {
    if (!look->files[i]) continue;
    look->set[i].revents = look->tells_closed ? report_number(look->files[i], &look->set[i])
                                              : report(look->files[i], look->set[i].events);
    ready += look->set[i].revents != 0;
  }
  return ready;
}

/* Asks the kernel about its part and fills that in. Descriptors ready in both, or -1. */
static int look_at_kernel(struct look *look) {
  if (look->theirs && REAL(poll)(look->kernel, look->count, 0) < 0) return -1;
  int ready = 0;
  for (nfds_t i = 0; i < look->count; i++) {
    short kernel = look->theirs && look->kernel[i].fd >= 0 ? look->kernel[i].revents : 0;
    /* An epoll descriptor is both's. */
    look->set[i].revents = look->files[i] ? (short)(look->set[i].revents | kernel) : kernel;
    ready += look->set[i].revents != 0;
  }
  return ready;
}

/* Who gives a connection up may make another: in another slot, whose words are not those that are slept on. */
static uint32_t dissolved(const struct look *look) {
  uint32_t sum = 0;
  for (nfds_t i = 0; i < look->count; i++)
    if (look->files[i] && look->files[i]->kind == FILE_SOCKET)
      sum += atomic_load_explicit(&look->files[i]->socket->dissolved, memory_order_relaxed);
  return sum;
}

static bool any_of_ours(void *context) {
  struct look *look = context;
  return look_at_ours(look) != 0 || dissolved(look) != look->dissolved;
}

/* Few sockets and nothing else: sleeps on their own words.  False: they do not fit. */
static bool own_words(struct look *look, struct wait_word *words, int *count) {
  *count = 0;
  if (look->theirs || look->nested) return false;
  look->dissolved = dissolved(look);
  for (nfds_t i = 0; i < look->count; i++) {
    if (!look->files[i]) continue;
    if (look->files[i] == &file_forked || *count + SOCKET_WORDS > WORDS) return false;
    bool out = look->set[i].events & (POLLOUT | POLLWRNORM);
    bool in = look->set[i].events & (POLLIN | POLLRDNORM | POLLRDHUP | POLLPRI) || !out;
    int added = socket_wait_words(look->files[i]->socket, in, out, words + *count);
    if (added == 1) return false; /* no slot yet: it may get one meanwhile */
    *count += added;
  }
  return *count > 0;
}

/* Makes a set of the sockets of this call. NULL: ENOMEM. */
static struct instance *gather(struct look *look) {
  struct instance *set = set_new();
  if (!set) return NULL;
  int error = 0;
  routes_take();
  for (nfds_t i = 0; i < look->count && !error; i++) {
    struct file *f = look->files[i];
    struct epoll_event event = {.events = (uint16_t)look->set[i].events};
    if (f && f != &file_forked && !set_find(set, (int)i, f)) error = set_add(set, (int)i, f, &event);
  }
  if (error) set_remove_all(set);
  routes_release();
  if (!error) return set;
  set_free(set);
  return NULL;
}

static void scatter(void *gathered) {
  struct instance *set = *(struct instance **)gathered;
  if (!set) return;
  routes_take();
  set_remove_all(set);
  routes_release();
  set_free(set);
}

static int wait_for(struct look *look, uint64_t deadline_ns, struct wait_signals since, bool masked) {
  struct wait_word words[WORDS];
  int word_count;
  int ready = look_at_ours(look);
  if ((ready || deadline_ns == 0) && endpoint_let_nic_look(&wait_self()->idle)) ready = look_at_ours(look);
  if (!ready && deadline_ns == 0 && endpoint_let_nic_catch_up()) ready = look_at_ours(look);
  if (ready || deadline_ns == 0) return look_at_kernel(look);
  while (!masked && own_words(look, words, &word_count)) {
    int result = wait_until(words, word_count, any_of_ours, look, deadline_ns, since, true);
    if (result == 0 && !look_at_ours(look)) continue;
    if (result == 0) return look_at_kernel(look);
    for (nfds_t i = 0; i < look->count; i++) look->set[i].revents = 0;
    if (result == -ETIMEDOUT) return 0;
    errno = -result;
    return -1;
  }
  struct vmmc_idle *idle = &wait_self()->idle;
  struct instance *set = NULL;
  AT_END(scattered, scatter, &set);
  int result = 0;
  wait_begin();
  uint32_t looked = 0; /* into the kernel, after so many polls */
  bool everything = true;
  for (;;) {
    ready = look_at_ours(look);
    if (ready || everything || idle->polls - looked >= KERNEL_LOOK) {
      looked = idle->polls;
      everything = false;
      result = look_at_kernel(look);
      if (result) break;
    }
    if (wait_interrupted(since, true)) {
      errno = EINTR;
      result = -1;
      break;
    }
    if (deadline_ns != WAIT_FOREVER && vmmc_now_ns() >= deadline_ns) {
      result = look_at_kernel(look);
      break;
    }
    if (wait_poll()) continue;
    if (!set) {
      if (!(set = gather(look))) {
        errno = ENOMEM;
        result = -1;
        break;
      }
      /* What changed before the sockets had the set's wake group is seen by one more look. */
      everything = true;
      continue;
    }
    set_sleep(set, look->theirs ? look->kernel : NULL, look->count, atomic_load(&set->kicks), deadline_ns, since);
    set_clear_list(set);
    vmmc_idle_woken(idle);
    everything = true;
  }
  return result;
}

/* What a call has while it is under way, cancelled or not. */
struct call {
  struct look look;
  void *memory;
  const sigset_t *mask; /* in force since `before` was */
  sigset_t before;
};

static void call_end(void *context) {
  struct call *call = context;
  if (!call->mask && !call->memory) {
    for (nfds_t i = 0; i < call->look.count; i++)
      if (call->look.files[i]) file_put(call->look.files[i]); /* keeps errno */
    return;
  }
  int error = errno;
  if (call->mask) pthread_sigmask(SIG_SETMASK, &call->before, NULL);
  for (nfds_t i = 0; i < call->look.count; i++)
    if (call->look.files[i]) file_put(call->look.files[i]);
  free(call->memory);
  errno = error;
}

/* poll over a set that has some of ours in it. deadline_ns 0: only look. */
static int poll_ours(struct pollfd *set, nfds_t count, uint64_t deadline_ns, const sigset_t *mask, bool tells_closed) {
  struct file *few_files[ON_STACK];
  struct pollfd few_kernel[ON_STACK + SET_SLEEP_OURS];
  struct call call; /* no initialiser: it would clear `before` each time */
  struct look *look = &call.look;
  call.look = (struct look){.set = set, .files = few_files, .kernel = few_kernel, .tells_closed = tells_closed};
  call.memory = NULL;
  call.mask = NULL;
  AT_END(ended, call_end, &call);
  if (count > ON_STACK) {
    call.memory = malloc(count * sizeof(struct file *) + (count + SET_SLEEP_OURS) * sizeof(struct pollfd));
    if (!call.memory) {
      errno = ENOMEM;
      return -1;
    }
    look->files = call.memory;
    look->kernel = (struct pollfd *)(look->files + count);
  }
  for (nfds_t i = 0; i < count; i++) {
    struct file *f = set[i].fd >= 0 ? file_get(set[i].fd) : NULL;
    look->files[i] = f;
    look->count++;
    look->kernel[i] = set[i];
    set[i].revents = 0;
    if (f) look->ours++;
    if (f && f->kind == FILE_EPOLL) look->nested++;
    if (f && f->kind != FILE_EPOLL) look->kernel[i].fd = -1;
    else if (set[i].fd >= 0) look->theirs++;
  }
  struct wait_signals since = wait_signals_now();
  if (mask) {
    pthread_sigmask(SIG_SETMASK, mask, &call.before); /* after `since`: what it lets through interrupts */
    call.mask = mask;
  }
  return wait_for(look, deadline_ns, since, mask != NULL);
}

static void free_memory(void *memory) {
  int error = errno;
  free(memory);
  errno = error;
}

/* The program's set.  What cannot be read has none of ours: the kernel says what is wrong with it. */
struct given {
  struct pollfd *set;
  nfds_t count;
  struct pollfd *copy;
  bool has_ours;
};
static void look_for_ours(void *context) {
  struct given *given = context;
  for (nfds_t i = 0; i < given->count && !given->has_ours; i++)
    given->has_ours = given->set[i].fd >= 0 && descriptor_peek(given->set[i].fd);
}
static void give_events(void *context) {
  struct given *given = context;
  for (nfds_t i = 0; i < given->count; i++) given->set[i].revents = given->copy[i].revents;
}

static bool has_ours(struct pollfd *set, nfds_t count) {
  struct given given = {.set = set, .count = count};
  return process_on_node && count <= DESCRIPTOR_CHUNK * DESCRIPTOR_CHUNKS && fault_guard(look_for_ours, &given) &&
         given.has_ours;
}

/* Polls a copy of the program's set, as the kernel does. */
static int poll_given(struct pollfd *set, nfds_t count, uint64_t deadline_ns, const sigset_t *mask) {
  struct pollfd few[ON_STACK], *copy = few, *memory = NULL;
  if (count > ON_STACK && !(copy = memory = malloc(count * sizeof *copy))) {
    errno = ENOMEM;
    return -1;
  }
  AT_END(freed, free_memory, memory);
  int result = 0;
  if (fault_copy(copy, set, count * sizeof *copy)) {
    result = poll_ours(copy, count, deadline_ns, mask, true);
    if (fault_guard(give_events, &(struct given){.set = set, .count = count, .copy = copy})) return result;
  }
  errno = EFAULT;
  return -1;
}

/* When a relative time is over; 0: at once. */
static uint64_t deadline_of(uint64_t nanoseconds) {
  return nanoseconds == 0 ? 0 : nanoseconds >= INT64_MAX / 2 ? WAIT_FOREVER : vmmc_now_ns() + nanoseconds;
}

static uint64_t nanoseconds_of(const struct timespec *t) {
  return t->tv_sec > INT32_MAX ? WAIT_FOREVER : (uint64_t)t->tv_sec * 1000000000 + (uint64_t)t->tv_nsec;
}

/* A call's timeout and mask, each of which may be NULL: 0 or an errno. */
static int take_wait(struct timespec *limit, const struct timespec *timeout, sigset_t *own_mask, const sigset_t *mask) {
  if (timeout && !fault_copy(limit, timeout, sizeof *limit)) return EFAULT;
  if (timeout && (limit->tv_sec < 0 || limit->tv_nsec < 0 || limit->tv_nsec >= 1000000000)) return EINVAL;
  return mask && !take_mask(own_mask, mask) ? EFAULT : 0;
}

static int refused(int error) {
  errno = error;
  return -1;
}

INTERPOSE int poll(struct pollfd *set, nfds_t count, int timeout_ms) {
  if (!has_ours(set, count)) return REAL(poll)(set, count, timeout_ms);
  pthread_testcancel();
  return poll_given(set, count, timeout_ms < 0 ? WAIT_FOREVER : deadline_of((uint64_t)timeout_ms * 1000000), NULL);
}
int __poll(struct pollfd *set, nfds_t count, int timeout_ms) __attribute__((alias("poll"), visibility("default")));

INTERPOSE int ppoll(struct pollfd *set, nfds_t count, const struct timespec *timeout, const sigset_t *mask) {
  struct timespec limit;
  sigset_t own_mask;
  if (!has_ours(set, count)) return REAL(ppoll)(set, count, timeout, mask);
  int error = take_wait(&limit, timeout, &own_mask, mask);
  if (error) return refused(error);
  pthread_testcancel();
  return poll_given(set, count, timeout ? deadline_of(nanoseconds_of(&limit)) : WAIT_FOREVER, mask ? &own_mask : NULL);
}

INTERPOSE int __poll_chk(struct pollfd *set, nfds_t count, int timeout_ms, size_t size) {
  if (size / sizeof *set < count) __chk_fail();
  return poll(set, count, timeout_ms);
}
INTERPOSE int __ppoll_chk(struct pollfd *set, nfds_t count, const struct timespec *timeout, const sigset_t *mask,
                          size_t size) {
  if (size / sizeof *set < count) __chk_fail();
  return ppoll(set, count, timeout, mask);
}

/* ---- select ---- */

/* Programs use sets longer than fd_set: plain words, whatever their number. */
static bool has_bit(const fd_set *set, int fd) {
  return set && ((const unsigned long *)(const void *)set)[fd / (8 * (int)sizeof(long))] >> (fd % (8 * (int)sizeof(long))) & 1;
}
static void put_bit(fd_set *set, int fd) {
  ((unsigned long *)(void *)set)[fd / (8 * (int)sizeof(long))] |= 1ul << (fd % (8 * (int)sizeof(long)));
}
static void clear_bits(fd_set *set, int limit) {
  enum { BITS = 8 * sizeof(long) };
  if (set) memset(set, 0, ((size_t)limit + BITS - 1) / BITS * sizeof(long));
}

/* The sets of one call. */
struct select_sets {
  int limit;
  fd_set *in, *out, *except;
  bool has_ours;
  struct pollfd *set; /* the same as poll takes it */
  nfds_t count;
  int result; /* descriptors to report; 0: none */
};

static void look_for_ours_in_sets(void *context) {
  struct select_sets *s = context;
  for (int fd = 0; fd < s->limit && !s->has_ours; fd++)
    s->has_ours = descriptor_peek(fd) && (has_bit(s->in, fd) || has_bit(s->out, fd) || has_bit(s->except, fd));
}

static bool select_has_ours(struct select_sets *s) {
  if (!process_on_node || s->limit < 0) return false;
  if (s->limit > DESCRIPTOR_CHUNK * DESCRIPTOR_CHUNKS) s->limit = DESCRIPTOR_CHUNK * DESCRIPTOR_CHUNKS;
  return fault_guard(look_for_ours_in_sets, s) && s->has_ours;
}

static void take_sets(void *context) {
  struct select_sets *s = context;
  for (int fd = 0; fd < s->limit; fd++) {
    short events = (short)((has_bit(s->in, fd) ? POLLIN | POLLRDNORM | POLLRDBAND : 0) |
                           (has_bit(s->out, fd) ? POLLOUT | POLLWRNORM | POLLWRBAND : 0) |
                           (has_bit(s->except, fd) ? POLLPRI : 0));
    if (events) s->set[s->count++] = (struct pollfd){.fd = fd, .events = events};
  }
}

enum { /* which poll bits stand for which set, as in the kernel's select */
  SELECT_IN = POLLIN | POLLRDNORM | POLLRDBAND | POLLHUP | POLLERR,
  SELECT_OUT = POLLOUT | POLLWRNORM | POLLWRBAND | POLLERR,
  SELECT_EXCEPT = POLLPRI,
};

static void give_sets(void *context) {
  struct select_sets *s = context;
  clear_bits(s->in, s->limit);
  clear_bits(s->out, s->limit);
  clear_bits(s->except, s->limit);
  for (nfds_t i = 0; s->result > 0 && i < s->count; i++) {
    short got = s->set[i].revents, wanted = s->set[i].events;
    if (wanted & POLLIN && got & SELECT_IN) put_bit(s->in, s->set[i].fd);
    if (wanted & POLLOUT && got & SELECT_OUT) put_bit(s->out, s->set[i].fd);
    if (wanted & POLLPRI && got & SELECT_EXCEPT) put_bit(s->except, s->set[i].fd);
  }
}

static int select_ours(struct select_sets *s, uint64_t deadline_ns, const sigset_t *mask) {
  struct pollfd few[ON_STACK], *set = few, *memory = NULL;
  if (s->limit > ON_STACK && !(set = memory = malloc((size_t)s->limit * sizeof *set))) {
    errno = ENOMEM;
    return -1;
  }
  AT_END(freed, free_memory, memory);
  s->set = set;
  if (!fault_guard(take_sets, s)) {
    errno = EFAULT;
    return -1;
  }
  nfds_t count = s->count;
  int result;
  for (;;) {
    result = poll_ours(set, count, deadline_ns, mask, false);
    if (result <= 0) break;
    /* poll reports a hang-up to whom select would not, a set of writers only, say: such a one must go on
     * waiting, and is asked less about. */
    int bits = 0;
    bool invalid = false;
    for (nfds_t i = 0; i < count; i++) {
      short got = set[i].revents;
      if (got & POLLNVAL) invalid = true;
      if (set[i].events & POLLIN && got & SELECT_IN) bits++;
      if (set[i].events & POLLOUT && got & SELECT_OUT) bits++;
      if (set[i].events & POLLPRI && got & SELECT_EXCEPT) bits++;
    }
    if (invalid) {
      errno = EBADF;
      result = -1;
    }
    if (invalid || bits || deadline_ns == 0) {
      if (!invalid) result = bits;
      break;
    }
    for (nfds_t i = 0; i < count; i++)
      if (set[i].revents) set[i].fd = -1;
  }
  s->result = result;
  if (result >= 0 && !fault_guard(give_sets, s)) {
    errno = EFAULT;
    return -1;
  }
  return result;
}

INTERPOSE int select(int limit, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
                     struct timeval *restrict timeout) {
  struct select_sets sets = {.limit = limit, .in = in, .out = out, .except = except};
  struct timeval limit_time;
  if (!select_has_ours(&sets)) return REAL(select)(limit, in, out, except, timeout);
  if (timeout && !fault_copy(&limit_time, timeout, sizeof limit_time)) return refused(EFAULT);
  if (timeout && (limit_time.tv_sec < 0 || limit_time.tv_usec < 0)) return refused(EINVAL);
  pthread_testcancel();
  uint64_t deadline_ns = WAIT_FOREVER;
  if (timeout && limit_time.tv_sec <= INT32_MAX)
    deadline_ns = deadline_of((uint64_t)limit_time.tv_sec * 1000000000 + (uint64_t)limit_time.tv_usec * 1000);
  int result = select_ours(&sets, deadline_ns, NULL);
  if (timeout && deadline_ns != WAIT_FOREVER) { /* Linux leaves what was not slept, where it can */
    int error = errno;
    uint64_t now = vmmc_now_ns(), left = deadline_ns > now ? deadline_ns - now : 0;
    limit_time = (struct timeval){(time_t)(left / 1000000000), (suseconds_t)(left % 1000000000 / 1000)};
    (void)fault_copy(timeout, &limit_time, sizeof limit_time);
    errno = error;
  }
  return result;
}
int __select(int limit, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
             struct timeval *restrict timeout) __attribute__((alias("select"), visibility("default")));

INTERPOSE int pselect(int limit, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
                      const struct timespec *restrict timeout, const sigset_t *restrict mask) {
  struct select_sets sets = {.limit = limit, .in = in, .out = out, .except = except};
  struct timespec limit_time;
  sigset_t own_mask;
  if (!select_has_ours(&sets)) return REAL(pselect)(limit, in, out, except, timeout, mask);
  int error = take_wait(&limit_time, timeout, &own_mask, mask);
  if (error) return refused(error);
  pthread_testcancel();
  return select_ours(&sets, timeout ? deadline_of(nanoseconds_of(&limit_time)) : WAIT_FOREVER, mask ? &own_mask : NULL);
}
