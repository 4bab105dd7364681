/*
 * epoll.c: the epoll family.
 *
 * An epoll descriptor is a kernel epoll instance, which holds the kernel descriptors of the set, with a
 * set of ours beside it for the VMMC sockets.  While there are none of those, every call goes to the kernel.
 */
#include <errno.h>
#include <limits.h>
#include <sys/syscall.h>

#include "fault.h"
#include "process.h"
#include "readiness.h"
#include "real.h"

/* ---- making ---- */

/* Keeps a set beside a new kernel instance; without memory the instance is given up. */
static struct file *track(int epoll_fd) {
  struct instance *set = set_new();
  struct file *f = set ? file_new(FILE_EPOLL, NULL, set) : NULL;
  if (!f) {
    if (set) set_free(set);
    errno = ENOMEM;
    return NULL;
  }
  set->file = f;
  if (descriptor_install(epoll_fd, f) == 0) return f;
  int error = errno;
  file_put(f);
  errno = error;
  return NULL;
}

static int created(int fd) {
  if (fd < 0) return fd;
  descriptor_fresh(fd);
  if (!process_on_node || descriptor_is_borrowed() || track(fd)) return fd;
  int error = errno;
  REAL(close)(fd);
  errno = error;
  return -1;
}

INTERPOSE int epoll_create(int size) { return created(REAL(epoll_create)(size)); }
INTERPOSE int epoll_create1(int flags) { return created(REAL(epoll_create1)(flags)); }

/* An epoll descriptor that we did not see made (before a fork, say) gets its set when it needs one. */
static struct file *adopt(int epoll_fd, int socket_fd) {
  struct epoll_event probe = {0};
  /* Modifying what is not in it fails with ENOENT, unless it is no epoll descriptor at all. */
  if (REAL(epoll_ctl)(epoll_fd, EPOLL_CTL_MOD, socket_fd, &probe) == 0 || errno != ENOENT) return NULL;
  struct file *f = track(epoll_fd);
  if (!f) return NULL;
  atomic_store(&f->set->kernel_members, 1); /* it may have some */
  return file_get(epoll_fd);
}

/* ---- epoll_ctl ---- */

/* Threads wait in the kernel's epoll_wait, since the set had no sockets: calls them back. */
static void call_back(struct instance *set, int epoll_fd) { /* with routes held */
  if (!atomic_load(&set->kernel_waiters)) return;
  if (set->kick_fd < 0)
    set->kick_fd = endpoint_private_descriptor((int)REAL(syscall)(SYS_eventfd2, 1, EFD_CLOEXEC | EFD_NONBLOCK));
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = set};
  if (set->kick_fd >= 0) REAL(epoll_ctl)(epoll_fd, EPOLL_CTL_ADD, set->kick_fd, &event);
}

/* Takes the call-back's own event out of what the kernel reported. */
static int without_call_back(struct instance *set, struct epoll_event *events, int count) {
  for (int i = 0; i < count; i++)
    if (events[i].data.ptr == (void *)set) events[i--] = events[--count];
  return count;
}

static int change_socket(struct instance *set, int epoll_fd, int operation, int fd, struct file *f,
                         const struct epoll_event *given) {
  struct epoll_event taken, *event = &taken;
  if (operation != EPOLL_CTL_DEL && !fault_copy(&taken, given, sizeof taken)) return -EFAULT;
  if (operation != EPOLL_CTL_DEL && event->events & EPOLLEXCLUSIVE &&
      (operation == EPOLL_CTL_MOD || f->kind == FILE_EPOLL ||
       event->events & ~(EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLWAKEUP | EPOLLET | EPOLLEXCLUSIVE)))
    return -EINVAL;
  int result = 0;
  routes_take();
  struct item *item = set_find(set, fd, f);
  if (operation == EPOLL_CTL_ADD) {
    result = item ? -EEXIST : set_add(set, fd, f, event);
    if (result == 0) call_back(set, epoll_fd);
    item = result == 0 ? set_find(set, fd, f) : NULL;
  } else if (!item) {
    result = operation == EPOLL_CTL_DEL || operation == EPOLL_CTL_MOD ? -ENOENT : -EINVAL;
  } else if (operation == EPOLL_CTL_DEL) {
    set_remove(item);
    item = NULL;
  } else if (operation == EPOLL_CTL_MOD && !(item->events & EPOLLEXCLUSIVE)) {
    critical_lock(&set->lock);
    item->events = event->events;
    item->data = event->data;
    item->fresh = true;
    item->disabled = false;
    critical_unlock(&set->lock);
  } else {
    result = -EINVAL;
    item = NULL;
  }
  if (item && readiness_of(f) & (item->events | EPOLLERR | EPOLLHUP)) set_raise(item, true);
  routes_release();
  return result;
}

INTERPOSE int epoll_ctl(int epoll_fd, int operation, int fd, struct epoll_event *event) {
  struct file *epoll = file_get(epoll_fd), *f = file_get(fd);
  int result;
  if (f == &file_forked) {
    result = descriptor_refuse(fd);
  } else if (!f || f->kind == FILE_EPOLL || epoll == f) {
    result = REAL(epoll_ctl)(epoll_fd, operation, fd, event);
    if (result == 0 && epoll && epoll->kind == FILE_EPOLL) {
      if (operation == EPOLL_CTL_ADD) {
        atomic_fetch_add(&epoll->set->kernel_members, 1);
        set_kick(epoll->set); /* who sleeps on its sockets alone */
      }
      if (operation == EPOLL_CTL_DEL) atomic_fetch_sub(&epoll->set->kernel_members, 1);
      /* A set within a set: the kernel has its kernel part, its sockets are ours to report. */
      if (f) change_socket(epoll->set, epoll_fd, operation, fd, f, event);
    }
  } else {
    if (!epoll) epoll = adopt(epoll_fd, fd);
    if (!epoll || epoll->kind != FILE_EPOLL) {
      if (epoll) errno = EINVAL;
      result = -1;
    } else {
      result = change_socket(epoll->set, epoll_fd, operation, fd, f, event);
      if (result < 0) errno = -result, result = -1;
    }
  }
  if (f) file_put(f);
  if (epoll) file_put(epoll);
  return result;
}

/* ---- epoll_wait ---- */

enum { KERNEL_LOOK = 16 }; /* polls (vmmc_idle.polls) for each look into the kernel */

static int left_ms(uint64_t deadline_ns) {
  if (deadline_ns == WAIT_FOREVER) return -1;
  uint64_t now = vmmc_now_ns();
  uint64_t left = deadline_ns > now ? (deadline_ns - now + 999999) / 1000000 : 0;
  return left > INT_MAX ? INT_MAX : (int)left;
}

/* Its number leads to the kernel's part, unless somebody closes it while others wait: of the sockets they hear. */
static bool has_kernel_part(const struct instance *set, int epoll_fd) {
  return atomic_load_explicit(&set->kernel_members, memory_order_relaxed) > 0 && descriptor_peek(epoll_fd) == set->file;
}

/* Events of both sides; `look`: ask the kernel even if our side has none. */
static int collect(struct instance *set, int epoll_fd, struct epoll_event *events, int room, bool look) {
  int count = 0;
  set_look(set);
  bool kernel = has_kernel_part(set, epoll_fd);
  /* Where the room is small neither side may keep the other out. */
  bool kernel_first = kernel && (look || atomic_load_explicit(&set->filled, memory_order_relaxed)) &&
                      (atomic_fetch_add_explicit(&set->turn, 1, memory_order_relaxed) & 1);
  for (int side = 0; side < 2 && count < room; side++) {
    if (side == 1 && !count && !look && !kernel_first) break; /* nothing to return: the kernel is asked in its time */
    if ((side == 0) == kernel_first) {
      int n = kernel ? REAL(epoll_wait)(epoll_fd, events + count, room - count, 0) : 0;
      if (n < 0 && !count && has_kernel_part(set, epoll_fd)) return -1;
      if (n > 0) count += without_call_back(set, events + count, n);
    } else {
      int n = set_harvest(set, events + count, room - count);
      if (n < 0 && !count) return -1;
      if (n > 0) count += n;
    }
  }
  atomic_store_explicit(&set->filled, count == room, memory_order_relaxed);
  return count;
}

/* The wait once the set has sockets. */
static int wait_mixed(struct instance *set, int epoll_fd, struct epoll_event *events, int room, uint64_t deadline_ns,
                      struct wait_signals since) {
  struct vmmc_idle *idle = &wait_self()->idle;
  wait_begin();
  bool everything = deadline_ns == 0, waited_for_nic = false;
  uint32_t looked = 0; /* into the kernel, after so many polls */
  for (;;) {
    uint32_t kicks = atomic_load(&set->kicks); /* before the look at what to sleep on */
    bool kernel = has_kernel_part(set, epoll_fd);
    /* While it polls, what only the kernel has may wait for a few looks; a sleep ends for both sides. */
    bool due = everything || idle->polls - looked >= KERNEL_LOOK;
    if (due || set_stirs(set)) {
      if (due) looked = idle->polls;
      if (!waited_for_nic) endpoint_let_nic_look(idle);
      waited_for_nic = true;
      int count = collect(set, epoll_fd, events, room, due);
      if (count) return count;
    }
    if (deadline_ns == 0) { /* only a look: as in the kernel, nothing interrupts it */
      if (endpoint_let_nic_catch_up()) continue;
      return 0;
    }
    if (wait_interrupted(since, true)) {
      errno = EINTR;
      return -1;
    }
    if (deadline_ns != WAIT_FOREVER && vmmc_now_ns() >= deadline_ns) {
      if (everything) return 0;
      everything = true;
      continue;
    }
    everything = false;
    if (wait_poll()) continue;
    struct pollfd in_kernel[1 + SET_SLEEP_OURS] = {{.fd = epoll_fd, .events = POLLIN}};
    set_sleep(set, kernel ? in_kernel : NULL, 1, kicks, deadline_ns, since);
    vmmc_idle_woken(idle);
    everything = true;
  }
}

/* A signal mask that is in force for the time of a call, cancelled or not. */
struct masked {
  const sigset_t *mask;
  sigset_t before;
};
static void unmask(void *masked) {
  struct masked *m = masked;
  if (!m->mask) return;
  int error = errno;
  pthread_sigmask(SIG_SETMASK, &m->before, NULL);
  errno = error;
}

struct kernel_wait {
  struct instance *set;
  int epoll_fd;
};
static void kernel_wait_end(void *wait) {
  struct kernel_wait *w = wait;
  int error = errno;
  if (atomic_fetch_sub(&w->set->kernel_waiters, 1) == 1 && w->set->kick_fd >= 0) {
    routes_take();
    if (w->set->kick_fd >= 0 && !atomic_load(&w->set->kernel_waiters))
      REAL(epoll_ctl)(w->epoll_fd, EPOLL_CTL_DEL, w->set->kick_fd, NULL);
    routes_release();
  }
  errno = error;
}

/* The wait as long as the set has no sockets.  False: it has some now; else *result. */
static bool wait_in_kernel(struct instance *set, int epoll_fd, struct epoll_event *events, int room,
                           uint64_t deadline_ns, const sigset_t *mask, int *result) {
  int count = 0;
  bool over = false;
  atomic_fetch_add(&set->kernel_waiters, 1); /* before the look at members: whoever adds one looks after */
  struct kernel_wait wait = {set, epoll_fd};
  AT_END(waiting, kernel_wait_end, &wait);
  while (!over && !atomic_load(&set->members)) {
    struct timespec left = {0, 0}, *left_or_forever = &left;
    uint64_t now = deadline_ns && deadline_ns != WAIT_FOREVER ? vmmc_now_ns() : 0;
    if (deadline_ns == WAIT_FOREVER) left_or_forever = NULL;
    else if (deadline_ns > now)
      left = (struct timespec){(time_t)((deadline_ns - now) / 1000000000), (long)((deadline_ns - now) % 1000000000)};
    count = REAL(epoll_pwait2) ? REAL(epoll_pwait2)(epoll_fd, events, room, left_or_forever, mask)
                               : REAL(epoll_pwait)(epoll_fd, events, room, left_ms(deadline_ns), mask);
    int mine = count < 0 ? count : without_call_back(set, events, count);
    over = mine == count || mine > 0; /* anything but a call-back alone */
    count = mine;
  }
  *result = count;
  return over;
}

static int wait_call(int epoll_fd, struct epoll_event *events, int room, const struct timespec *given_timeout,
                     const sigset_t *given_mask) {
  struct timespec timeout_taken, *timeout = given_timeout ? &timeout_taken : NULL;
  sigset_t mask_taken, *mask = given_mask ? &mask_taken : NULL;
  if ((timeout && !fault_copy(timeout, given_timeout, sizeof *timeout)) || (mask && !take_mask(mask, given_mask))) {
    errno = EFAULT;
    return -1;
  }
  struct file *f = descriptor_peek(epoll_fd) ? file_get(epoll_fd) : NULL;
  /* The kernel's answer to what is no set of ours, and to nonsense. */
  if (!f || f->kind != FILE_EPOLL || !events || room <= 0 || room > INT_MAX / (int)sizeof *events || (timeout && (timeout->tv_sec < 0 || timeout->tv_nsec < 0))) {
    if (f) file_put(f);
    if (REAL(epoll_pwait2)) return REAL(epoll_pwait2)(epoll_fd, events, room, timeout, mask);
    return REAL(epoll_pwait)(epoll_fd, events, room, timeout ? (int)(timeout->tv_sec * 1000 + timeout->tv_nsec / 1000000) : -1, mask);
  }
  HOLDING(f);
  struct instance *set = f->set;
  struct wait_signals since = wait_signals_now();
  uint64_t deadline_ns = WAIT_FOREVER;
  if (timeout && timeout->tv_sec < INT_MAX)
    deadline_ns = (timeout->tv_sec || timeout->tv_nsec ? vmmc_now_ns() : 0) + (uint64_t)timeout->tv_sec * 1000000000 +
                  (uint64_t)timeout->tv_nsec;
  int count = 0;
  if (wait_in_kernel(set, epoll_fd, events, room, deadline_ns, mask, &count)) return count;
  struct masked masked;
  masked.mask = mask;
  AT_END(mask_in_force, unmask, &masked);
  if (mask) pthread_sigmask(SIG_SETMASK, mask, &masked.before); /* after `since`: what it lets through interrupts */
  return wait_mixed(set, epoll_fd, events, room, deadline_ns, since);
}

static int wait_ms(int epoll_fd, struct epoll_event *events, int room, int timeout_ms, const sigset_t *mask) {
  struct timespec timeout = {timeout_ms / 1000, timeout_ms % 1000 * 1000000l};
  pthread_testcancel();
  return wait_call(epoll_fd, events, room, timeout_ms < 0 ? NULL : &timeout, mask);
}

INTERPOSE int epoll_wait(int epoll_fd, struct epoll_event *events, int room, int timeout_ms) {
  if (!descriptor_peek(epoll_fd)) return REAL(epoll_wait)(epoll_fd, events, room, timeout_ms);
  return wait_ms(epoll_fd, events, room, timeout_ms, NULL);
}
INTERPOSE int epoll_pwait(int epoll_fd, struct epoll_event *events, int room, int timeout_ms, const sigset_t *mask) {
  if (!descriptor_peek(epoll_fd)) return REAL(epoll_pwait)(epoll_fd, events, room, timeout_ms, mask);
  return wait_ms(epoll_fd, events, room, timeout_ms, mask);
}
INTERPOSE int epoll_pwait2(int epoll_fd, struct epoll_event *events, int room, const struct timespec *timeout,
                           const sigset_t *mask) {
  if (!descriptor_peek(epoll_fd)) return REAL(epoll_pwait2)(epoll_fd, events, room, timeout, mask);
  return wait_call(epoll_fd, events, room, timeout, mask);
}
