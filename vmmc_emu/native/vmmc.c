/*
 * vmmc.c: attachments made through vmmc.h: where a node's daemon is found, how a call begins and waits,
 * how an endpoint ends.
 */
#include "vmmc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "sys.h"
#include "vmmc_private.h"

int fail(int error) {
  errno = error;
  return -1;
}

/* ---- whose process this is ---- */

/* The process id of whoever attached, in a page that a fork empties: a child finds 0 there even if no
 * fork handler ran for it, and its own id once it has attached anew. */
static _Atomic int32_t *attached_pid;
static pthread_once_t attached_pid_once = PTHREAD_ONCE_INIT;

static void attached_pid_make(void) {
  void *page = mmap(NULL, VMMC_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return;
  if (madvise(page, VMMC_PAGE, MADV_WIPEONFORK)) {
    munmap(page, VMMC_PAGE);
    return;
  }
  attached_pid = page;
}

static bool attached_pid_set(void) {
  pthread_once(&attached_pid_once, attached_pid_make);
  if (attached_pid) atomic_store(attached_pid, sys_getpid());
  return attached_pid;
}

/* ---- calls ---- */

/* Is it one of this process's, and not ended?  Else false, with errno. */
static bool is_usable(const struct vmmc_endpoint *v) {
  int error = 0;
  if (!v)
    error = EINVAL;
  else if (atomic_load_explicit(attached_pid, memory_order_relaxed) != v->endpoint->pid)
    error = EBADF;
  else if (atomic_load_explicit(&v->ended, memory_order_relaxed))
    error = ECONNRESET;
  if (error) errno = error;
  return !error;
}

bool call_begin(struct vmmc_endpoint *v) {
  if (!is_usable(v)) return false;
  int served = endpoint_served(v->endpoint);
  if (served) errno = -served;
  return !served;
}

struct call {
  struct vmmc_endpoint *v;
  bool (*ready)(void *context);
  void *context;
  bool is_ready;
};

static bool call_is_over(void *context) {
  struct call *call = context;
  /* Once is enough: what is ready may have been taken by the look that found it. */
  if (!call->is_ready) call->is_ready = call->ready(call->context);
  return call->is_ready || endpoint_detached(call->v->endpoint) ||
         atomic_load_explicit(&call->v->ended, memory_order_acquire);
}

/* How a call ends that is over. */
static int call_outcome(const struct call *call) {
  if (call->is_ready) return 0;
  int served = endpoint_served(call->v->endpoint);
  return served ? -served : ECONNRESET;
}

int call_wait(struct vmmc_endpoint *v, const struct wait_word *words, int count, bool (*ready)(void *context),
              void *context, int timeout_ms) {
  struct call call = {v, ready, context, false};
  if (call_is_over(&call)) return call_outcome(&call);
  if (timeout_ms == 0) return ETIMEDOUT;
  struct wait_word all[4] = {{&v->ended, &v->asleep}};
  for (int i = 0; i < count && i < 3; i++) all[i + 1] = words[i];
  uint64_t deadline = timeout_ms < 0 ? WAIT_FOREVER : vmmc_now_ns() + (uint64_t)timeout_ms * 1000000u;
  int error = wait_until(all, count + 1, call_is_over, &call, deadline, wait_signals_now(), timeout_ms >= 0);
  return error ? -error : call_outcome(&call);
}

/* ---- where a node's daemon listens ---- */

static bool cluster_name_is_good(const char *name) {
  size_t length = strlen(name);
  return length >= 1 && length <= VMMC_NAME_MAX &&
         strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == length;
}

enum { PATH_ROOM = 4096 };

/* What the cluster's lock says its runtime directory is: it may have been started in a session with
 * another XDG_RUNTIME_DIR.  False: there is no lock of ours, or it says nothing that is plain text. */
static bool runtime_recorded(const char *cluster, char *path) {
  snprintf(path, PATH_ROOM, "/dev/shm/vmmc.%u.%s.lock", (unsigned)getuid(), cluster);
  int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return false;
  char text[PATH_ROOM];
  ssize_t length = read(fd, text, sizeof text - 1);
  close(fd);
  if (length <= 0) return false;
  text[length] = 0;
  const char key[] = "\"runtime\": \"";
  char *from = strstr(text, key);
  if (!from) return false;
  from += sizeof key - 1;
  char *end = strpbrk(from, "\"\\");
  if (!end || *end != '"') return false;
  *end = 0;
  snprintf(path, PATH_ROOM, "%s", from);
  return true;
}

/* The cluster's runtime directory, found as docs/architecture.md says. */
static void runtime_directory(const char *cluster, char *path) {
  const char *root = getenv("VMMC_RUNTIME_DIR");
  if (root && *root) {
    snprintf(path, PATH_ROOM, "%s/%s", root, cluster);
    return;
  }
  if (runtime_recorded(cluster, path)) return;
  root = getenv("XDG_RUNTIME_DIR");
  if (root && *root && access(root, W_OK) == 0)
    snprintf(path, PATH_ROOM, "%s/vmmc-emu/%s", root, cluster);
  else
    snprintf(path, PATH_ROOM, "/tmp/vmmc-emu-%u/%s", (unsigned)getuid(), cluster);
}

/* 0, or why there is no such daemon. */
static int daemon_socket(const char *cluster, int node, char *path) {
  if (!cluster) cluster = getenv("VMMC_CLUSTER");
  if (!cluster || !*cluster) cluster = "default";
  if (!cluster_name_is_good(cluster) || node < 0) return EINVAL;
  runtime_directory(cluster, path);
  if (access(path, F_OK)) return ENOENT;
  size_t length = strlen(path);
  snprintf(path + length, PATH_ROOM - length, "/node%d.sock", node);
  if (strlen(path) >= sizeof((struct sockaddr_un *)0)->sun_path) return ENAMETOOLONG;
  return access(path, F_OK) ? EHOSTUNREACH : 0;
}

/* ---- attach and detach ---- */

static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the making of the shared one */

/* Commands, redirections and answers lie in pages that are there: a full /dev/shm is an error now. */
static int commit_tables(struct endpoint *e) {
  uint64_t end = VMMC_APP_EXPORTS + VMMC_EXPORTS * sizeof(struct vmmc_app_export);
  int error = endpoint_commit(e->app + VMMC_APP_COMMANDS, end - VMMC_APP_COMMANDS, true);
  end = VMMC_NIC_NOTIFICATIONS + VMMC_NOTIFICATIONS * sizeof(struct vmmc_notification);
  if (!error) error = endpoint_commit(e->nic + VMMC_NIC_COMPLETIONS, end - VMMC_NIC_COMPLETIONS, false);
  return -error;
}

static struct vmmc_endpoint *wrap(struct endpoint *e, bool shared) {
  int error = commit_tables(e);
  /* commands lie in it as they do in the segment, at a line each: malloc aligns less */
  struct vmmc_endpoint *v = error ? NULL : aligned_alloc(_Alignof(struct vmmc_endpoint), sizeof *v);
  if (v) memset(v, 0, sizeof *v);
  if (!v || heap_start(v)) {
    free(v);
    errno = error ? error : ENOMEM;
    return NULL;
  }
  v->endpoint = e;
  v->shared = shared;
  v->references = 1;
  pthread_mutex_init(&v->lock, NULL);
  utlb_start(v);
  commands_start(v);
  notify_start(v);
  /* The socket layer finds it here, once it is whole. */
  atomic_thread_fence(memory_order_release);
  e->vmmc = v;
  return v;
}

static struct vmmc_endpoint *attach_here(void) {
  struct endpoint *e = endpoint_default();
  if (!e) return NULL;
  pthread_mutex_lock(&shared_lock);
  struct vmmc_endpoint *v = e->vmmc;
  if (v)
    v->references++;
  else
    v = wrap(e, true);
  pthread_mutex_unlock(&shared_lock);
  return v;
}

struct vmmc_endpoint *vmmc_attach(const char *cluster, int node) {
  if (!attached_pid_set()) {
    errno = ENOMEM;
    return NULL;
  }
  if (node == VMMC_HERE) return attach_here();
  char path[PATH_ROOM];
  struct endpoint *e = NULL;
  int error = daemon_socket(cluster, node, path);
  if (!error) error = -endpoint_attach(path, true, &e);
  if (error) {
    errno = error;
    return NULL;
  }
  struct vmmc_endpoint *v = wrap(e, false);
  if (!v) {
    error = errno;
    endpoint_detach(e);
    errno = error;
  }
  return v;
}

/* The shared endpoint goes on, for sockets: only what was exported through it ends. */
static int end_shared(struct vmmc_endpoint *v) {
  pthread_mutex_lock(&shared_lock);
  bool last = v->references && --v->references == 0;
  pthread_mutex_unlock(&shared_lock);
  if (endpoint_detached(v->endpoint)) return 0; /* they have ended */
  for (int id = 0; last && id < VMMC_EXPORTS; id++)
    if (vmmc_unexport(v, id) && errno != EINVAL) return -1;
  return 0;
}

int vmmc_end(struct vmmc_endpoint *v) {
  if (!is_usable(v)) return -1;
  if (v->shared) return end_shared(v);
  if (v->notifier.started && pthread_equal(pthread_self(), v->notifier.thread)) return fail(EDEADLK);
  /* release: whoever finds it ended need not look at anything else */
  atomic_store_explicit(&v->ended, 1, memory_order_release);
  vmmc_futex_wake(&v->ended);
  int error = notify_stop(v);
  /* The daemon sees what it would see of a death, and has everything of ours ended. */
  sys_call(SYS_shutdown, v->endpoint->attach_fd, SHUT_RDWR, 0, 0, 0, 0);
  return error ? fail(error) : 0;
}

int vmmc_detach(struct vmmc_endpoint *v) {
  if (v && v->shared) return vmmc_end(v);
  if (vmmc_end(v) && errno != ECONNRESET) return -1;
  endpoint_detach(v->endpoint);
  heap_stop(v);
  pthread_mutex_destroy(&v->lock);
  free(v);
  return 0;
}

uint32_t vmmc_node(const struct vmmc_endpoint *v) { return v->endpoint->node; }
uint32_t vmmc_nodes(const struct vmmc_endpoint *v) { return v->endpoint->nodes; }
uint32_t vmmc_serial(const struct vmmc_endpoint *v) { return v->endpoint->serial; }
