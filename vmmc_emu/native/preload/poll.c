/* poll.c: poll, select and their like over VMMC sockets and any other descriptors. */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "process.h"
#include "readiness.h"
#include "real.h"

enum {
  KERNEL_LOOK = 16, /* looks at our sockets for each look into the kernel, while polling */
  ON_STACK = 256,   /* descriptors of one call that need no allocation */
  WORDS = 16,       /* what wait_until takes */
};

/* One call under way. */
struct look {
  struct pollfd *set; /* the program's */
  nfds_t count;
  struct file **files;   /* of each entry, held; NULL: the kernel's */
  struct pollfd *kernel; /* the kernel's part, entries of ours with -1; room for one more */
  nfds_t ours, theirs, nested;
};

/* What poll reports of one of ours. */
static short report(struct file *f, short wanted) {
  if (f == &file_forked) return POLLNVAL;
  uint32_t ready = readiness_of(f);
  if (ready & POLLIN) ready |= POLLRDNORM;
  if (ready & POLLOUT) ready |= POLLWRNORM;
  return (short)(ready & ((uint16_t)wanted | POLLERR | POLLHUP));
}

static int look_at_ours(struct look *look) {
  int ready = 0;
  for (nfds_t i = 0; i < look->count; i++) {
    if (!look->files[i]) continue;
    look->set[i].revents = report(look->files[i], look->set[i].events);
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

static bool any_of_ours(void *context) { return look_at_ours(context) != 0; }

/* Few sockets and nothing else: sleeps on their own words.  False: they do not fit. */
static bool own_words(struct look *look, struct wait_word *words, int *count) {
  *count = 0;
  if (look->theirs || look->nested) return false;
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

static void scatter(struct instance **gathered) {
  struct instance *set = *gathered;
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
  if (ready || deadline_ns == 0) return look_at_kernel(look);
  if (!masked && own_words(look, words, &word_count)) {
    int result = wait_until(words, word_count, any_of_ours, look, deadline_ns, true);
    if (result == 0) return look_at_kernel(look);
    for (nfds_t i = 0; i < look->count; i++) look->set[i].revents = 0;
    if (result == -ETIMEDOUT) return 0;
    errno = -result;
    return -1;
  }
  struct vmmc_idle *idle = &wait_self()->idle;
  struct instance *set __attribute__((cleanup(scatter))) = NULL; /* also when the thread is cancelled */
  int result = 0;
  vmmc_idle_begin(idle);
  for (unsigned round = 0;; round++) {
    ready = look_at_ours(look);
    if (ready || round % KERNEL_LOOK == 0) {
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
    if (vmmc_idle_poll(idle)) continue;
    if (!set) {
      if (!(set = gather(look))) {
        errno = ENOMEM;
        result = -1;
        break;
      }
      /* What changed before the sockets had the set's wake group is seen by one more look. */
      round = UINT_MAX;
      continue;
    }
    set_sleep(set, look->theirs ? look->kernel : NULL, look->count, deadline_ns, since);
    set_clear_list(set);
    vmmc_idle_woken(idle);
    round = UINT_MAX;
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

static void call_end(struct call *call) {
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
static int poll_ours(struct pollfd *set, nfds_t count, uint64_t deadline_ns, const sigset_t *mask) {
  struct file *few_files[ON_STACK];
  struct pollfd few_kernel[ON_STACK + 1];
  struct call call __attribute__((cleanup(call_end))); /* no initialiser: it would clear `before` each time */
  struct look *look = &call.look;
  call.look = (struct look){.set = set, .files = few_files, .kernel = few_kernel};
  call.memory = NULL;
  call.mask = NULL;
  if (count > ON_STACK) {
    call.memory = malloc(count * sizeof(struct file *) + (count + 1) * sizeof(struct pollfd));
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

static bool has_ours(const struct pollfd *set, nfds_t count) {
  for (nfds_t i = 0; i < count; i++)
    if (set[i].fd >= 0 && descriptor_peek(set[i].fd)) return true;
  return false;
}

/* When a relative time is over; 0: at once. */
static uint64_t deadline_of(uint64_t nanoseconds) {
  return nanoseconds == 0 ? 0 : nanoseconds >= INT64_MAX / 2 ? WAIT_FOREVER : vmmc_now_ns() + nanoseconds;
}

static uint64_t nanoseconds_of(const struct timespec *t) {
  return t->tv_sec > INT32_MAX ? WAIT_FOREVER : (uint64_t)t->tv_sec * 1000000000 + (uint64_t)t->tv_nsec;
}

static bool is_valid(const struct timespec *t) { return t->tv_sec >= 0 && t->tv_nsec >= 0 && t->tv_nsec < 1000000000; }

INTERPOSE int poll(struct pollfd *set, nfds_t count, int timeout_ms) {
  if (!process_on_node || socket_is_nowhere(set) || !has_ours(set, count)) return REAL(poll)(set, count, timeout_ms);
  pthread_testcancel();
  return poll_ours(set, count, timeout_ms < 0 ? WAIT_FOREVER : deadline_of((uint64_t)timeout_ms * 1000000), NULL);
}
int __poll(struct pollfd *set, nfds_t count, int timeout_ms) __attribute__((alias("poll"), visibility("default")));

INTERPOSE int ppoll(struct pollfd *set, nfds_t count, const struct timespec *timeout, const sigset_t *mask) {
  if (!process_on_node || socket_is_nowhere(set) || (timeout && !is_valid(timeout)) || !has_ours(set, count))
    return REAL(ppoll)(set, count, timeout, mask);
  pthread_testcancel();
  return poll_ours(set, count, timeout ? deadline_of(nanoseconds_of(timeout)) : WAIT_FOREVER, mask);
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

static bool select_has_ours(int limit, const fd_set *in, const fd_set *out, const fd_set *except) {
  for (int fd = 0; fd < limit; fd++)
    if (descriptor_peek(fd) && (has_bit(in, fd) || has_bit(out, fd) || has_bit(except, fd))) return true;
  return false;
}

enum { /* which poll bits stand for which set, as in the kernel's select */
  SELECT_IN = POLLIN | POLLRDNORM | POLLRDBAND | POLLHUP | POLLERR,
  SELECT_OUT = POLLOUT | POLLWRNORM | POLLWRBAND | POLLERR,
  SELECT_EXCEPT = POLLPRI,
};

static void free_memory(struct pollfd **memory) {
  int error = errno;
  free(*memory);
  errno = error;
}

static int select_ours(int limit, fd_set *in, fd_set *out, fd_set *except, uint64_t deadline_ns, const sigset_t *mask) {
  struct pollfd few[ON_STACK], *set = few, *memory __attribute__((cleanup(free_memory))) = NULL;
  nfds_t count = 0;
  if (limit > ON_STACK && !(set = memory = malloc((size_t)limit * sizeof *set))) {
    errno = ENOMEM;
    return -1;
  }
  for (int fd = 0; fd < limit; fd++) {
    short events = (short)((has_bit(in, fd) ? POLLIN | POLLRDNORM | POLLRDBAND : 0) |
                           (has_bit(out, fd) ? POLLOUT | POLLWRNORM | POLLWRBAND : 0) |
                           (has_bit(except, fd) ? POLLPRI : 0));
    if (events) set[count++] = (struct pollfd){.fd = fd, .events = events};
  }
  int result;
  for (;;) {
    result = poll_ours(set, count, deadline_ns, mask);
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
  if (result >= 0) {
    clear_bits(in, limit);
    clear_bits(out, limit);
    clear_bits(except, limit);
    for (nfds_t i = 0; result > 0 && i < count; i++) {
      short got = set[i].revents, wanted = set[i].events;
      if (wanted & POLLIN && got & SELECT_IN) put_bit(in, set[i].fd);
      if (wanted & POLLOUT && got & SELECT_OUT) put_bit(out, set[i].fd);
      if (wanted & POLLPRI && got & SELECT_EXCEPT) put_bit(except, set[i].fd);
    }
  }
  return result;
}

INTERPOSE int select(int limit, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
                     struct timeval *restrict timeout) {
  if (!process_on_node || limit < 0 || (timeout && (timeout->tv_sec < 0 || timeout->tv_usec < 0)) ||
      !select_has_ours(limit, in, out, except))
    return REAL(select)(limit, in, out, except, timeout);
  pthread_testcancel();
  uint64_t deadline_ns = WAIT_FOREVER;
  if (timeout && timeout->tv_sec <= INT32_MAX)
    deadline_ns = deadline_of((uint64_t)timeout->tv_sec * 1000000000 + (uint64_t)timeout->tv_usec * 1000);
  int result = select_ours(limit, in, out, except, deadline_ns, NULL);
  if (timeout && deadline_ns != WAIT_FOREVER) { /* Linux leaves what was not slept */
    uint64_t now = vmmc_now_ns(), left = deadline_ns > now ? deadline_ns - now : 0;
    *timeout = (struct timeval){(time_t)(left / 1000000000), (suseconds_t)(left % 1000000000 / 1000)};
  }
  return result;
}
int __select(int limit, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
             struct timeval *restrict timeout) __attribute__((alias("select"), visibility("default")));

INTERPOSE int pselect(int limit, fd_set *restrict in, fd_set *restrict out, fd_set *restrict except,
                      const struct timespec *restrict timeout, const sigset_t *restrict mask) {
  if (!process_on_node || limit < 0 || (timeout && !is_valid(timeout)) || !select_has_ours(limit, in, out, except))
    return REAL(pselect)(limit, in, out, except, timeout, mask);
  pthread_testcancel();
  return select_ours(limit, in, out, except, timeout ? deadline_of(nanoseconds_of(timeout)) : WAIT_FOREVER, mask);
}
