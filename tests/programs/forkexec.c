/*
 * What fork and exec do to VMMC sockets, case by case.
 *
 *     forkexec CASE HOST PORT     an echo server listens there
 *
 * Ends with 0 when everything was as it should be.
 */
#include <dirent.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "check.h"

static const char *self, *host, *port;

/* Every call on the descriptor says EBADF, as for one that was never open. */
static void check_closed_to_me(int fd) {
  char byte = 'x';
  struct iovec vector = {&byte, 1};
  struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
  struct sockaddr_storage address;
  socklen_t length = sizeof address;
  int value = 1;
  CHECK_FAILS(read(fd, &byte, 1), EBADF);
  CHECK_FAILS(write(fd, &byte, 1), EBADF);
  CHECK_FAILS(readv(fd, &vector, 1), EBADF);
  CHECK_FAILS(writev(fd, &vector, 1), EBADF);
  CHECK_FAILS(send(fd, &byte, 1, 0), EBADF);
  CHECK_FAILS(recv(fd, &byte, 1, 0), EBADF);
  CHECK_FAILS(sendto(fd, &byte, 1, 0, NULL, 0), EBADF);
  CHECK_FAILS(recvfrom(fd, &byte, 1, 0, NULL, NULL), EBADF);
  CHECK_FAILS(sendmsg(fd, &message, 0), EBADF);
  CHECK_FAILS(recvmsg(fd, &message, 0), EBADF);
  CHECK_FAILS(shutdown(fd, SHUT_RDWR), EBADF);
  CHECK_FAILS(listen(fd, 1), EBADF);
  CHECK_FAILS(accept(fd, NULL, NULL), EBADF);
  CHECK_FAILS(getsockname(fd, (struct sockaddr *)&address, &length), EBADF);
  CHECK_FAILS(getpeername(fd, (struct sockaddr *)&address, &length), EBADF);
  length = sizeof value;
  CHECK_FAILS(getsockopt(fd, SOL_SOCKET, SO_ERROR, &value, &length), EBADF);
  CHECK_FAILS(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &value, sizeof value), EBADF);
  CHECK_FAILS(ioctl(fd, FIONREAD, &value), EBADF);
  CHECK_FAILS(dup(fd), EBADF);
  struct pollfd watched = {.fd = fd, .events = POLLIN};
  CHECK(poll(&watched, 1, 0) == 1 && watched.revents == POLLNVAL);
}

static void fork_closes_in_child(void) {
  int fd = connect_to(host, port);
  check_echo(fd, "before");
  pid_t child = fork();
  if (!child) {
    check_closed_to_me(fd);
    _exit(0);
  }
  check_child(child);
  check_echo(fd, "after");
}

static void closing_in_child_succeeds(void) {
  int fd = connect_to(host, port), second = dup(fd);
  CHECK(second >= 0);
  pid_t child = fork();
  if (!child) {
    CHECK(close(fd) == 0);
    CHECK(close(second) == 0);
    CHECK_FAILS(close(fd), EBADF);
    exit(0); /* with all that exit runs */
  }
  check_child(child);
  check_echo(fd, "the parent's go on");
  check_echo(second, "both of them");
}

static void close_range_in_child(void) {
  int fd = connect_to(host, port);
  pid_t child = fork();
  if (!child) {
    CHECK(close_range(3, ~0u, 0) == 0);
    check_closed_to_me(fd);
    _exit(0);
  }
  check_child(child);
  check_echo(fd, "after close_range in the child");
}

static void listening_socket(void) {
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = {.sin_family = AF_INET};
  socklen_t length = sizeof address;
  CHECK(bind(listener, (struct sockaddr *)&address, length) == 0);
  CHECK(listen(listener, 4) == 0);
  CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
  pid_t child = fork();
  if (!child) {
    CHECK_FAILS(accept(listener, NULL, NULL), EBADF);
    CHECK(close(listener) == 0);
    _exit(0);
  }
  check_child(child);
  /* The parent still listens: a second child connects with a socket of its own. */
  child = fork();
  if (!child) {
    char number[8];
    snprintf(number, sizeof number, "%d", ntohs(address.sin_port));
    int fd = connect_to("127.0.0.1", number);
    CHECK(write(fd, "hello", 5) == 5);
    _exit(0);
  }
  int accepted = accept(listener, NULL, NULL);
  CHECK(accepted >= 0);
  char text[8];
  CHECK(recv(accepted, text, 5, MSG_WAITALL) == 5 && memcmp(text, "hello", 5) == 0);
  CHECK(recv(accepted, text, 5, 0) == 0);
  check_child(child);
}

static void child_opens_its_own(void) {
  int fd = connect_to(host, port);
  pid_t child = fork();
  if (!child) {
    int own = connect_to(host, port);
    check_echo(own, "from the child");
    pid_t grandchild = fork();
    if (!grandchild) {
      check_closed_to_me(own);
      check_echo(connect_to(host, port), "from the grandchild");
      _exit(0);
    }
    check_child(grandchild);
    check_echo(own, "from the child again");
    _exit(0);
  }
  check_echo(fd, "from the parent meanwhile");
  check_child(child);
  check_echo(fd, "from the parent afterwards");
}

static void number_used_again_in_child(void) {
  int fd = connect_to(host, port), ends[2];
  CHECK(pipe(ends) == 0);
  pid_t child = fork();
  if (!child) {
    CHECK(dup2(ends[1], fd) == fd); /* what inetd does: the number is the pipe's now */
    CHECK(write(fd, "through the pipe", 16) == 16);
    _exit(0);
  }
  check_child(child);
  char text[16];
  CHECK(read(ends[0], text, 16) == 16 && memcmp(text, "through the pipe", 16) == 0);
  check_echo(fd, "the socket is as it was");
}

static void epoll_and_select_in_child(void) {
  int fd = connect_to(host, port), set = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.fd = fd};
  CHECK(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
  CHECK(epoll_wait(set, &event, 1, 0) == 1 && (event.events & EPOLLOUT));
  pid_t child = fork();
  if (!child) {
    fd_set watched;
    FD_ZERO(&watched);
    FD_SET(fd, &watched);
    struct timeval no_time = {0};
    CHECK_FAILS(select(fd + 1, &watched, NULL, NULL, &no_time), EBADF);
    CHECK_FAILS(epoll_ctl(set, EPOLL_CTL_MOD, fd, &event), EBADF);
    CHECK(close(set) == 0);
    _exit(0);
  }
  check_child(child);
  CHECK(epoll_wait(set, &event, 1, 0) == 1 && (event.events & EPOLLOUT));
  check_echo(fd, "after the child's close of the epoll set");
}

/* A child that ran no fork handler: what a library that calls clone itself makes. */
static void raw_clone(void) {
  int fd = connect_to(host, port);
  pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
  if (!child) {
    char byte = 'x';
    CHECK_FAILS(send(fd, &byte, 1, 0), EBADF);
    CHECK_FAILS(recv(fd, &byte, 1, 0), EBADF);
    CHECK(close(fd) == 0);
    _exit(0);
  }
  check_child(child);
  check_echo(fd, "after clone");
}

static void *receive_one(void *fd) {
  char byte;
  return (void *)(intptr_t)recv(*(int *)fd, &byte, 1, 0);
}

static void fork_while_a_thread_receives(void) {
  int fd = connect_to(host, port);
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, receive_one, &fd) == 0);
  for (int i = 0; i < 8; i++) {
    pid_t child = fork();
    if (!child) {
      CHECK_FAILS(send(fd, "x", 1, 0), EBADF);
      _exit(0);
    }
    check_child(child);
  }
  void *received;
  CHECK(send(fd, "!", 1, 0) == 1);
  CHECK(pthread_join(thread, &received) == 0 && (intptr_t)received == 1);
}

static void parent_dies_first(void) {
  int fd = connect_to(host, port), ends[2];
  CHECK(pipe(ends) == 0);
  pid_t parent = fork();
  if (!parent) {
    pid_t child = fork();
    if (!child) {
      char byte;
      close(ends[1]);
      CHECK(read(ends[0], &byte, 1) == 0); /* all who held the other end are gone */
      check_echo(connect_to(host, port), "from an orphan");
      _exit(0);
    }
    CHECK(child > 0);
    _exit(0);
  }
  check_child(parent);
  close(ends[1]);
  check_echo(fd, "after a child and before an orphan ended");
}

/* ---- other ways to start programs disturb nothing ---- */

static void vfork_and_exec(void) {
  int fd = connect_to(host, port);
  for (int i = 0; i < 4; i++) {
    pid_t child = vfork();
    if (!child) {
      /* In the parent's memory: what it closes must stay open in the parent. */
      close(fd);
      close_range(3, ~0u, 0);
      execve("/bin/true", (char *[]){"true", NULL}, environ);
      _exit(127);
    }
    check_child(child);
    check_echo(fd, "after vfork");
  }
}

static void vfork_and_dup2(void) {
  int fd = connect_to(host, port), ends[2];
  CHECK(pipe2(ends, O_CLOEXEC) == 0);
  pid_t child = vfork();
  if (!child) {
    dup2(ends[1], 1);
    dup2(ends[1], fd);
    execve("/bin/echo", (char *[]){"echo", "-n", "hello", NULL}, environ);
    _exit(127);
  }
  close(ends[1]);
  char text[8];
  CHECK(read(ends[0], text, sizeof text) == 5 && memcmp(text, "hello", 5) == 0);
  check_child(child);
  check_echo(fd, "after dup2 in a child of vfork");
}

static void spawn(void) {
  int fd = connect_to(host, port), null = open("/dev/null", O_RDWR);
  posix_spawn_file_actions_t actions;
  CHECK(posix_spawn_file_actions_init(&actions) == 0);
  CHECK(posix_spawn_file_actions_adddup2(&actions, null, fd) == 0);
  CHECK(posix_spawn_file_actions_addclose(&actions, fd) == 0);
  CHECK(posix_spawn_file_actions_addclosefrom_np(&actions, 3) == 0);
  pid_t child;
  CHECK(posix_spawn(&child, "/bin/true", &actions, NULL, (char *[]){"true", NULL}, environ) == 0);
  check_child(child);
  check_echo(fd, "after posix_spawn");
}

static void system_and_popen(void) {
  int fd = connect_to(host, port);
  CHECK(system("true") == 0);
  check_echo(fd, "after system");
  FILE *pipe = popen("echo hello", "r");
  char line[16];
  CHECK(pipe && fgets(line, sizeof line, pipe) && strcmp(line, "hello\n") == 0);
  CHECK(pclose(pipe) == 0);
  check_echo(fd, "after popen");
}

static void fork_and_exec(void) {
  int fd = connect_to(host, port);
  pid_t child = fork();
  if (!child) {
    execl("/bin/true", "true", NULL);
    _exit(127);
  }
  check_child(child);
  check_echo(fd, "after fork and exec");
}

/* A failed exec leaves everything as it was. */
static void exec_fails(void) {
  int fd = connect_to(host, port);
  CHECK_FAILS(execl("/nonexistent", "nonexistent", NULL), ENOENT);
  check_echo(fd, "after an exec that failed");
}

/* ---- exec leaves nothing ---- */

static void exec_leaves_nothing(void) {
  int fd = connect_to(host, port), set = epoll_create1(0), listener = socket(AF_INET6, SOCK_STREAM, 0);
  struct epoll_event event = {.events = EPOLLIN};
  CHECK(fcntl(fd, F_SETFD, 0) == 0 && fcntl(listener, F_SETFD, 0) == 0);
  CHECK(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0);
  CHECK(listen(listener, 1) == 0);
  check_echo(fd, "before exec");
  close(set);
  char first[8], second[8];
  snprintf(first, sizeof first, "%d", fd), snprintf(second, sizeof second, "%d", listener);
  execl(self, self, "after_exec", host, port, first, second, NULL);
  CHECK(!"exec");
}

/* The second half: what a process finds that was started by such an exec. */
static void after_exec(char **descriptors) {
  for (int i = 0; descriptors[i]; i++) {
    int fd = atoi(descriptors[i]);
    CHECK_FAILS(fcntl(fd, F_GETFD), EBADF);
    CHECK_FAILS(send(fd, "x", 1, 0), EBADF);
  }
  DIR *open_descriptors = opendir("/proc/self/fd");
  for (struct dirent *entry; (entry = readdir(open_descriptors));) {
    int fd = atoi(entry->d_name);
    if (fd > 2 && fd != dirfd(open_descriptors)) {
      char path[64], target[256] = "";
      snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
      readlink(path, target, sizeof target - 1);
      fprintf(stderr, "descriptor %d is open after exec: %s\n", fd, target);
      _exit(1);
    }
  }
  closedir(open_descriptors);
  check_echo(connect_to(host, port), "a socket of the new program's own");
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*run)(void);
  } cases[] = {
#define CASE(name) {#name, name}
    CASE(fork_closes_in_child), CASE(closing_in_child_succeeds), CASE(close_range_in_child), CASE(listening_socket),
    CASE(child_opens_its_own), CASE(number_used_again_in_child), CASE(epoll_and_select_in_child), CASE(raw_clone),
    CASE(fork_while_a_thread_receives), CASE(parent_dies_first), CASE(vfork_and_exec), CASE(vfork_and_dup2),
    CASE(spawn), CASE(system_and_popen), CASE(fork_and_exec), CASE(exec_fails), CASE(exec_leaves_nothing),
  };
  if (argc < 4) {
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) puts(cases[i].name);
    return argc > 1;
  }
  self = argv[0], host = argv[2], port = argv[3];
  if (!strcmp(argv[1], "after_exec")) {
    after_exec(argv + 4);
    return 0;
  }
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    if (!strcmp(argv[1], cases[i].name)) {
      cases[i].run();
      return 0;
    }
  }
  fprintf(stderr, "no case %s\n", argv[1]);
  return 2;
}
