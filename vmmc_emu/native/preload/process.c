/*
 * process.c: where this process stands: its node, what it inherited, what its forks and execs do.
 *
 * After a fork the parent's VMMC sockets are closed to the child; after an exec there are none.  A program
 * that is started from here and would not load this library is named on stderr, since its sockets would
 * silently be the kernel's.
 */
#include "process.h"

#include <elf.h>
#include <errno.h>
#include <limits.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "descriptors.h"
#include "fault.h"
#include "names.h"
#include "readiness.h"
#include "real.h"

bool process_on_node, process_diagnostics;
uint32_t process_node, process_nodes;

static const volatile char always_alive = 1;
const volatile char *process_alive = &always_alive;
static volatile char *fork_mark; /* a page of its own that the kernel wipes in a forked child */

/* ---- saying ---- */

void process_say(const char *format, ...) {
  int error = errno;
  char line[512];
  int length = snprintf(line, sizeof line, "vmmc: %s[%d]: ", program_invocation_short_name, (int)REAL(syscall)(SYS_getpid));
  va_list arguments;
  va_start(arguments, format);
  length += vsnprintf(line + length, sizeof line - (size_t)length - 1, format, arguments);
  va_end(arguments);
  if (length > (int)sizeof line - 2) length = sizeof line - 2;
  line[length++] = '\n';
  (void)!REAL(syscall)(SYS_write, 2, line, (size_t)length);
  errno = error;
}

/* ---- the environment that makes a program run on the node ---- */

enum { KEPT_MAX = 24 };
static char *kept[KEPT_MAX + 1]; /* LD_PRELOAD and VMMC_* as this process was started with */
static int kept_count;
static const char library_name[] = "libvmmc-preload.so";

static void keep_environment(void) {
  for (char **e = environ; *e && kept_count < KEPT_MAX; e++) {
    if (strncmp(*e, "VMMC_", 5) && (strncmp(*e, "LD_PRELOAD=", 11) || !strstr(*e, library_name))) continue;
    char *copy = strdup(*e);
    if (copy) kept[kept_count++] = copy;
  }
}

static bool same_name(const char *a, const char *b) {
  size_t length = strcspn(a, "=");
  return !strncmp(a, b, length) && b[length] == '=';
}

static bool is_place(const char *variable) {
  static const char *const place[] = {"VMMC_CLUSTER=", "VMMC_NODE=", "VMMC_NODES=", "VMMC_SOCKET="};
  for (size_t i = 0; i < sizeof place / sizeof *place; i++)
    if (!strncmp(variable, place[i], strlen(place[i]))) return true;
  return false;
}

/* Says that an environment names its node on purpose; `vmmc-emu run` does, and who is started takes it out. */
static const char placed[] = "VMMC_PLACED";

/*
 * Completes an environment without which the program would silently leave the node, and puts right one that is
 * another node's: launchers (MPICH's) pass on what they have themselves.  Who means it says VMMC_PLACED, or gives
 * VMMC_SOCKET no value: such a program has no node.  `list` has room for KEPT_MAX + 2 entries more than `given`,
 * `text` for a combined LD_PRELOAD.  No allocation: a vfork child.
 */
static char *const *on_node_environment(char *const *given, char **list, char *text, size_t text_size) {
  int count = 0;
  bool meant = false;
  for (; given && given[count]; count++) {
    list[count] = given[count];
    if (same_name(placed, given[count]) || !strcmp(given[count], "VMMC_SOCKET=")) meant = true;
  }
  int end = count;
  for (int k = 0; k < kept_count; k++) {
    int at = 0;
    while (at < count && !same_name(kept[k], list[at])) at++;
    if (at == count) {
      list[end++] = kept[k];
    } else if (is_place(kept[k])) {
      if (!meant) list[at] = kept[k];
    } else if (!strncmp(kept[k], "LD_PRELOAD=", 11) && !strstr(list[at], library_name)) {
      /* The program preloads something of its own: ours beside it. */
      int length = snprintf(text, text_size, "%s:%s", kept[k], list[at] + 11);
      list[at] = length < (int)text_size ? text : kept[k];
    }
  }
  list[end] = NULL;
  return list;
}

struct environment {
  char *const *given;
  size_t count;
  char **list; /* room for count + KEPT_MAX + 2 */
  char *text;
  size_t text_size;
  char *const *on_node;
};
static void count_environment(void *context) {
  struct environment *e = context;
  while (e->given && e->given[e->count]) e->count++;
}
static void complete_environment(void *context) {
  struct environment *e = context;
  e->on_node = on_node_environment(e->given, e->list, e->text, e->text_size);
}

/* One that cannot be read is the kernel's to refuse. */
#define NODE_ENVIRONMENT(given_environment)                                                                    \
  struct environment on_node = {.given = (given_environment), .on_node = (given_environment)};                 \
  bool completes = process_on_node && fault_guard(count_environment, &on_node);                                \
  char *environment_list[completes ? on_node.count + KEPT_MAX + 2 : 1], environment_text[completes ? 4096 : 1]; \
  on_node.list = environment_list;                                                                             \
  on_node.text = environment_text;                                                                             \
  on_node.text_size = sizeof environment_text;                                                                 \
  char *const *environment =                                                                                   \
      completes && fault_guard(complete_environment, &on_node) ? on_node.on_node : on_node.given

/* ---- programs that would go around VMMC ---- */

extern const ElfW(Ehdr) own_elf __asm__("__ehdr_start") __attribute__((visibility("hidden"))); /* this library's */

/* Why the program in an open file would not load this library; NULL: it would. A script's interpreter is
 * put in `interpreter`. */
static const char *why_around(int fd, char *interpreter, size_t size) {
  char head[4096];
  struct stat status;
  interpreter[0] = 0;
  if (fstat(fd, &status) < 0) return NULL;
  ssize_t length = pread(fd, head, sizeof head, 0);
  if (length < 4) return NULL;
  if (head[0] == '#' && head[1] == '!') {
    char *from = head + 2, *end = head + length;
    while (from < end && (*from == ' ' || *from == '\t')) from++;
    size_t n = 0;
    while (from + n < end && n < size - 1 && !strchr(" \t\r\n", from[n])) n++;
    memcpy(interpreter, from, n);
    interpreter[n] = 0;
    return NULL;
  }
  if (memcmp(head, ELFMAG, SELFMAG)) return NULL; /* not for us to say: the kernel will */
  if (((status.st_mode & S_ISUID) && status.st_uid != geteuid()) ||
      ((status.st_mode & (S_ISGID | S_IXGRP)) == (S_ISGID | S_IXGRP) && status.st_gid != getegid()))
    return "runs with another user's or group's rights, for which the loader ignores LD_PRELOAD";
  const ElfW(Ehdr) *elf = (const void *)head;
  if (length < (ssize_t)sizeof *elf || elf->e_ident[EI_CLASS] != own_elf.e_ident[EI_CLASS] ||
      elf->e_machine != own_elf.e_machine)
    return "is built for another ABI";
  bool interpreted = false, go = false;
  for (int i = 0; i < elf->e_phnum; i++) {
    size_t at = elf->e_phoff + (size_t)i * elf->e_phentsize;
    if (at + sizeof(ElfW(Phdr)) > (size_t)length) break;
    ElfW(Phdr) segment;
    memcpy(&segment, head + at, sizeof segment);
    if (segment.p_type == PT_INTERP) interpreted = true;
    if (segment.p_type == PT_NOTE && segment.p_offset + 16 <= (size_t)length &&
        !memcmp(head + segment.p_offset + 12, "Go\0", 4))
      go = true;
  }
  if (!interpreted) return "is statically linked";
  return go ? "is a Go program, which makes system calls without the C library" : NULL;
}

static void warn_about(int fd, const char *path) {
  char names[2][256];
  snprintf(names[0], sizeof names[0], "%s", path);
  for (int level = 0; fd >= 0 && level < 4; level++) {
    const char *why = why_around(fd, names[1], sizeof names[1]);
    if (level) REAL(syscall)(SYS_close, fd);
    if (why) process_say("%s %s: it goes around VMMC, its sockets are the host's and not the node's", names[0], why);
    if (why || !names[1][0]) return;
    memcpy(names[0], names[1], sizeof names[0]);
    fd = (int)REAL(syscall)(SYS_openat, AT_FDCWD, names[0], O_RDONLY | O_CLOEXEC);
  }
}

/* `search`: along PATH, as execvp does. */
static void examine(const char *path, bool search) {
  if (!process_on_node || !path) return;
  int error = errno, fd = -1;
  char candidate[PATH_MAX];
  if (!search || strchr(path, '/')) {
    fd = (int)REAL(syscall)(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
  } else {
    const char *from = getenv("PATH");
    if (!from) from = "/bin:/usr/bin";
    for (; fd < 0; from++) {
      size_t length = strcspn(from, ":");
      if (snprintf(candidate, sizeof candidate, "%.*s/%s", (int)length, from, path) < (int)sizeof candidate &&
          access(candidate, X_OK) == 0) {
        fd = (int)REAL(syscall)(SYS_openat, AT_FDCWD, candidate, O_RDONLY | O_CLOEXEC);
        path = candidate;
      }
      from += length;
      if (!*from) break;
    }
  }
  if (fd >= 0) {
    warn_about(fd, path);
    REAL(syscall)(SYS_close, fd);
  }
  errno = error;
}

/* Counts what an exec of this process itself closes; a negative number takes it back when it failed. */
static uint32_t count_exec(void) {
  if (!process_on_node || descriptor_is_borrowed()) return 0;
  struct endpoint *e = endpoint_current();
  uint32_t sockets = e ? descriptor_sockets() : 0;
  if (sockets) atomic_fetch_add_explicit(&app_header(e)->counters.exec_closed_sockets, sockets, memory_order_relaxed);
  return sockets;
}

static int exec_failed(uint32_t counted) {
  if (counted)
    atomic_fetch_sub_explicit(&app_header(endpoint_current())->counters.exec_closed_sockets, counted,
                              memory_order_relaxed);
  return -1;
}

/* ---- exec and spawn ---- */

INTERPOSE int execve(const char *path, char *const arguments[], char *const given[]) {
  NODE_ENVIRONMENT(given);
  examine(path, false);
  uint32_t counted = count_exec();
  REAL(execve)(path, arguments, environment);
  return exec_failed(counted);
}
INTERPOSE int execv(const char *path, char *const arguments[]) { return execve(path, arguments, environ); }

INTERPOSE int execvpe(const char *file, char *const arguments[], char *const given[]) {
  NODE_ENVIRONMENT(given);
  examine(file, true);
  uint32_t counted = count_exec();
  REAL(execvpe)(file, arguments, environment);
  return exec_failed(counted);
}
INTERPOSE int execvp(const char *file, char *const arguments[]) { return execvpe(file, arguments, environ); }

INTERPOSE int fexecve(int fd, char *const arguments[], char *const given[]) {
  NODE_ENVIRONMENT(given);
  if (process_on_node) warn_about(fd, "the program");
  uint32_t counted = count_exec();
  REAL(fexecve)(fd, arguments, environment);
  return exec_failed(counted);
}
INTERPOSE int execveat(int at, const char *path, char *const arguments[], char *const given[], int flags) {
  NODE_ENVIRONMENT(given);
  if (process_on_node) {
    int fd = flags & AT_EMPTY_PATH && !*path ? at : (int)REAL(syscall)(SYS_openat, at, path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) warn_about(fd, *path ? path : "the program");
    if (fd >= 0 && fd != at) REAL(syscall)(SYS_close, fd);
  }
  uint32_t counted = count_exec();
  REAL(execveat)(at, path, arguments, environment, flags);
  return exec_failed(counted);
}

/* The arguments of an execl, as an array on the stack; `after` is left at what follows the NULL. */
#define LIST_OF_ARGUMENTS(first)                            \
  va_list counting, after;                                  \
  size_t count = 1;                                         \
  va_start(counting, first);                                \
  while (va_arg(counting, char *)) count++;                 \
  va_end(counting);                                         \
  char *list[count + 1];                                    \
  list[0] = (char *)(uintptr_t)(first);                     \
  va_start(after, first);                                   \
  for (size_t i = 1; i <= count; i++) list[i] = va_arg(after, char *)

INTERPOSE int execl(const char *path, const char *first, ...) {
  LIST_OF_ARGUMENTS(first);
  va_end(after);
  return execve(path, list, environ);
}
INTERPOSE int execlp(const char *file, const char *first, ...) {
  LIST_OF_ARGUMENTS(first);
  va_end(after);
  return execvpe(file, list, environ);
}
INTERPOSE int execle(const char *path, const char *first, ...) {
  LIST_OF_ARGUMENTS(first);
  char *const *given = va_arg(after, char *const *);
  va_end(after);
  return execve(path, list, given);
}

INTERPOSE int posix_spawn(pid_t *restrict pid, const char *restrict path, const posix_spawn_file_actions_t *actions,
                          const posix_spawnattr_t *restrict attributes, char *const arguments[restrict],
                          char *const given[restrict]) {
  NODE_ENVIRONMENT(given);
  examine(path, false);
  return REAL(posix_spawn)(pid, path, actions, attributes, arguments, environment);
}
INTERPOSE int posix_spawnp(pid_t *restrict pid, const char *restrict file, const posix_spawn_file_actions_t *actions,
                           const posix_spawnattr_t *restrict attributes, char *const arguments[restrict],
                           char *const given[restrict]) {
  NODE_ENVIRONMENT(given);
  examine(file, true);
  return REAL(posix_spawnp)(pid, file, actions, attributes, arguments, environment);
}

/* ---- fork ---- */

void process_watch_forks(void) {
  if (process_alive != &always_alive) return;
  /* Concurrent first sockets make two pages, one of which is never used again. */
  char *page = mmap(NULL, VMMC_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return; /* fork handlers still tell, except in children that run none */
  if (madvise(page, VMMC_PAGE, MADV_WIPEONFORK) < 0) {
    munmap(page, VMMC_PAGE);
    return;
  }
  *page = 1;
  fork_mark = page;
  process_alive = page;
}

static void before_fork(void) {
  critical_begin(); /* no handler meets the locks that are taken here */
  readiness_fork_prepare();
  descriptor_fork_prepare();
}

static void in_parent(void) {
  descriptor_fork_parent();
  readiness_fork_parent();
  critical_end();
  struct endpoint *e = endpoint_current();
  uint32_t sockets = descriptor_sockets();
  if (e && sockets)
    atomic_fetch_add_explicit(&app_header(e)->counters.fork_closed_sockets, sockets, memory_order_relaxed);
}

void process_forked(void) {
  readiness_fork_child();
  descriptor_fork_child();
  if (fork_mark) *fork_mark = 1;
}

static void in_child(void) {
  process_forked();
  critical_end();
}

/* ---- the start ---- */

static void close_one_inherited(int fd, void *closed) {
  if (!descriptor_is_placeholder(fd)) return;
  ++*(int *)closed;
  if (fd > 2) {
    REAL(syscall)(SYS_close, fd);
    return;
  }
  /* A standard stream that is closed would become the next file opened: let it fail with EBADF instead. */
  int null = (int)REAL(syscall)(SYS_openat, AT_FDCWD, "/dev/null", fd == 0 ? O_WRONLY : O_RDONLY);
  if (null < 0) return;
  REAL(syscall)(SYS_dup3, null, fd, 0);
  REAL(syscall)(SYS_close, null);
}

static void close_inherited(void) {
  int closed = 0;
  descriptors_open(close_one_inherited, &closed);
  if (closed && process_diagnostics)
    process_say("%d VMMC socket%s of the program before exec %s closed: a new program has new memory, and user-level "
                "sockets live in memory",
                closed, closed == 1 ? "" : "s", closed == 1 ? "is" : "are");
}

void process_begin(void) {
  static bool begun;
  if (begun || !environ) return;
  begun = true;
  const char *diagnostics = getenv("VMMC_DIAGNOSTICS"), *daemon = getenv("VMMC_SOCKET");
  process_diagnostics = diagnostics && !strcmp(diagnostics, "1");
  if (diagnostics && *diagnostics && !process_diagnostics && strcmp(diagnostics, "0"))
    process_say("VMMC_DIAGNOSTICS=%.64s is neither 0 nor 1: using 0", diagnostics);
  unsetenv(placed);
  if (!daemon || !*daemon) return;
  if (!socket_place(&process_node, &process_nodes)) {
    const char *node = getenv("VMMC_NODE"), *nodes = getenv("VMMC_NODES");
    process_say("VMMC_NODE=%.64s, VMMC_NODES=%.64s are no place in a cluster (like node0 of 2): all sockets are the "
                "kernel's",
                node ? node : "", nodes ? nodes : "");
    return;
  }
  keep_environment();
  names_begin(daemon);
  descriptor_begin(daemon);
  close_inherited();
  pthread_atfork(before_fork, in_parent, in_child);
  process_on_node = true;
  signals_begin();
}

__attribute__((constructor)) static void begin(void) {
  int error = errno; /* 0 is what main is to find */
  if (!atomic_load(&real_known)) real_resolve();
  process_begin();
  errno = error;
}
