/* Calls that are given addresses where nothing is mapped, or nothing may be written: prints what each gave, which
 * is to be the same over the kernel and on a node; checks that the stream loses no byte by it, and that faults of
 * the program's own still reach its own handlers. */
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <fcntl.h>

#include "check.h"

enum { PAGE = 4096, PAGES = 64 };

static char *good;    /* pages that are there, with a hole behind them */
static char *hole;    /* a page that is not */
static char *fixed;   /* one that cannot be written */
static int a, b, listener, epoll;
static const char *name;

#define TELL(call)                                                                                     \
  do {                                                                                                 \
    errno = 0;                                                                                         \
    long result_ = (long)(call);                                                                       \
    printf("%s: %s: %ld %s\n", name, #call, result_, result_ < 0 ? strerrorname_np(errno) : "");       \
  } while (0)

static void memory(void) {
  good = mmap(NULL, (PAGES + 2) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(good != MAP_FAILED);
  hole = good + PAGES * PAGE;
  fixed = hole + PAGE;
  CHECK(munmap(hole, PAGE) == 0 && mprotect(fixed, PAGE, PROT_READ) == 0);
}

static struct sockaddr_in address = {.sin_family = AF_INET};

static void connect_both(void) {
  socklen_t length = sizeof address;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = 0;
  listener = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 5) == 0);
  CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
  a = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(a, (struct sockaddr *)&address, length) == 0);
  b = accept(listener, NULL, NULL);
  CHECK(b >= 0);
  epoll = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN};
  CHECK(epoll >= 0 && epoll_ctl(epoll, EPOLL_CTL_ADD, b, &event) == 0);
}

static void has_room(int fd) { CHECK(poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, 10000) == 1); }
static void arrives(int fd) { CHECK(poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, 10000) == 1); }

/* What b sends, a gets, all of it, in order. */
static uint64_t sent_to_b, got_at_b;
static unsigned char expected(uint64_t position) { return (unsigned char)(position * 2654435761u >> 11); }
static void fill(char *at, size_t length) {
  for (size_t i = 0; i < length; i++) at[i] = (char)expected(sent_to_b + i);
}
static void check_got(const char *at, size_t length) {
  for (size_t i = 0; i < length; i++) CHECK((unsigned char)at[i] == expected(got_at_b + i));
  got_at_b += length;
}
static void send_good(size_t length) {
  fill(good, length);
  CHECK(send(a, good, length, 0) == (ssize_t)length);
  sent_to_b += length;
}
static void receive_rest(void) {
  static char back[1 << 20];
  while (got_at_b < sent_to_b) {
    ssize_t n = recv(b, back, sizeof back, 0);
    CHECK(n > 0);
    check_got(back, (size_t)n);
  }
  CHECK_FAILS(recv(b, back, 1, MSG_DONTWAIT), EAGAIN);
}

static void senders(char *bad) {
  struct iovec pieces[] = {{good, 100}, {bad, 100}}, *in_it = (struct iovec *)bad;
  struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2}, no_pieces = {.msg_iov = in_it, .msg_iovlen = 1};
  struct msghdr named = {.msg_name = bad, .msg_namelen = 16, .msg_iov = pieces, .msg_iovlen = 1};
  TELL(send(a, bad, 5, 0));
  TELL(write(a, bad, 5));
  TELL(send(a, bad, 0, 0));
  TELL(sendto(a, bad, 5, 0, NULL, 0));
  TELL(sendto(a, good, 0, 0, (struct sockaddr *)bad, 16));
  TELL(send(a, bad - 10, 20, 0));
  TELL(writev(a, pieces + 1, 1));
  TELL(writev(a, pieces, 2));
  TELL(writev(a, in_it, 1));
  TELL(sendmsg(a, &message, 0));
  TELL(sendmsg(a, &no_pieces, 0));
  TELL(sendmsg(a, &named, 0));
  TELL(sendmsg(a, (struct msghdr *)bad, 0));
  TELL(sendmmsg(a, (struct mmsghdr *)bad, 1, 0));
  TELL(syscall(SYS_sendto, a, bad, 5, 0, NULL, 0));
}

static void receivers(char *bad) {
  struct iovec pieces[] = {{good, 3}, {bad, 100}}, *in_it = (struct iovec *)bad;
  struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2}, no_pieces = {.msg_iov = in_it, .msg_iovlen = 1};
  TELL(recv(b, bad, 5, MSG_DONTWAIT)); /* nothing there yet */
  send_good(10);
  arrives(b);
  TELL(recv(b, bad, 5, 0));
  TELL(recv(b, bad, 5, MSG_PEEK));
  TELL(recv(b, bad, 10, MSG_WAITALL));
  TELL(recv(b, bad, 20, MSG_DONTWAIT));
  TELL(read(b, bad, 5));
  TELL(recv(b, bad, 0, 0));
  TELL(recvfrom(b, bad, 5, 0, NULL, NULL));
  TELL(recv(b, bad - 5, 10, 0));
  TELL(readv(b, pieces + 1, 1));
  TELL(readv(b, pieces, 2));
  TELL(recvmsg(b, &message, 0));
  TELL(recvmsg(b, (struct msghdr *)bad, MSG_DONTWAIT));
  if (bad == hole) {
    TELL(readv(b, in_it, 1));
    TELL(recvmsg(b, &no_pieces, 0));
    TELL(recvmmsg(b, (struct mmsghdr *)bad, 1, 0, NULL));
    TELL(recvmmsg(b, (struct mmsghdr *)good, 1, 0, (struct timespec *)bad));
  }
  receive_rest();
}

static void names_and_options(char *bad) {
  socklen_t length = sizeof address;
  int number = 1;
  TELL(getsockname(a, (struct sockaddr *)bad, &length));
  length = sizeof address;
  TELL(getpeername(a, (struct sockaddr *)bad, &length));
  TELL(getsockname(a, (struct sockaddr *)good, (socklen_t *)bad));
  TELL(getpeername(a, (struct sockaddr *)good, (socklen_t *)bad));
  length = sizeof number;
  TELL(getsockopt(a, SOL_SOCKET, SO_TYPE, bad, &length));
  TELL(getsockopt(a, SOL_SOCKET, SO_TYPE, &number, (socklen_t *)bad));
  TELL(ioctl(a, FIONREAD, bad));
  if (bad != hole) return;
  int fresh = socket(AF_INET, SOCK_STREAM, 0);
  TELL(setsockopt(a, SOL_SOCKET, SO_KEEPALIVE, bad, 4));
  TELL(setsockopt(a, SOL_SOCKET, SO_KEEPALIVE, bad - 4, 64)); /* reads what it needs */
  TELL(setsockopt(a, SOL_SOCKET, SO_RCVTIMEO, bad, sizeof(struct timeval)));
  TELL(setsockopt(a, SOL_SOCKET, SO_LINGER, bad - 4, sizeof(struct linger)));
  TELL(ioctl(a, FIONBIO, bad));
  TELL(bind(fresh, (struct sockaddr *)bad, sizeof address));
  TELL(bind(fresh, (struct sockaddr *)(bad - 8), sizeof address));
  TELL(connect(fresh, (struct sockaddr *)bad, sizeof address));
  CHECK(close(fresh) == 0);
}

static void readiness(char *bad) {
  struct timespec none = {0, 0};
  send_good(1);
  arrives(b);
  TELL(epoll_wait(epoll, (struct epoll_event *)bad, 1, 0));
  TELL(epoll_wait(epoll, (struct epoll_event *)(bad - sizeof(struct epoll_event)), 2, 0));
  memset(good, 0, PAGE);
  fd_set *in = (fd_set *)good;
  FD_SET(b, in);
  if (bad == hole) {
    TELL(poll((struct pollfd *)bad, 1, 0));
    ((struct pollfd *)bad)[-1] = (struct pollfd){.fd = b, .events = POLLIN};
    TELL(poll((struct pollfd *)bad - 1, 2, 0));
    TELL(syscall(SYS_ppoll, (struct pollfd *)bad - 1, 1, bad, NULL, 8));
    TELL(syscall(SYS_ppoll, (struct pollfd *)bad - 1, 1, &none, bad, 8));
    TELL(select(b + 1, (fd_set *)bad, NULL, NULL, &(struct timeval){0, 0}));
    TELL(select(b + 1, in, (fd_set *)bad, NULL, &(struct timeval){0, 0}));
    TELL(syscall(SYS_select, b + 1, in, NULL, NULL, bad));
    TELL(syscall(SYS_pselect6, b + 1, in, NULL, NULL, &none, bad));
    TELL(epoll_ctl(epoll, EPOLL_CTL_ADD, a, (struct epoll_event *)bad));
    TELL(epoll_ctl(epoll, EPOLL_CTL_MOD, b, (struct epoll_event *)bad));
    TELL(syscall(SYS_epoll_pwait2, epoll, good, 1, bad, NULL, 8));
    TELL(syscall(SYS_epoll_pwait, epoll, good, 1, 0, bad, 8));
  } else {
    /* Read-only sets that have the descriptor in them. */
    CHECK(mprotect(bad, PAGE, PROT_READ | PROT_WRITE) == 0);
    *(struct pollfd *)bad = (struct pollfd){.fd = b, .events = POLLIN};
    FD_ZERO((fd_set *)(bad + 256));
    FD_SET(b, (fd_set *)(bad + 256));
    CHECK(mprotect(bad, PAGE, PROT_READ) == 0);
    TELL(poll((struct pollfd *)bad, 1, 0));
    TELL(select(b + 1, (fd_set *)(bad + 256), NULL, NULL, &(struct timeval){0, 0}));
    TELL(syscall(SYS_select, b + 1, in, NULL, NULL, bad + 1024));
  }
  struct epoll_event event; /* nothing was taken for reported */
  TELL(epoll_wait(epoll, &event, 1, 0));
  receive_rest();
}

static void accepting(char *bad) {
  socklen_t length = sizeof address;
  CHECK(fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
  TELL(accept(listener, (struct sockaddr *)bad, &length)); /* nobody there */
  for (int i = 0; i < 2; i++) {
    int client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(connect(client, (struct sockaddr *)&address, sizeof address) == 0);
    arrives(listener);
    length = sizeof address;
    if (i) TELL(accept(listener, (struct sockaddr *)good, (socklen_t *)bad));
    else TELL(accept4(listener, (struct sockaddr *)bad, &length, SOCK_CLOEXEC));
    TELL(accept(listener, NULL, NULL)); /* the connection is gone, */
    char byte;
    TELL(recv(client, &byte, 1, 0)); /* and the client hears of it */
    CHECK(close(client) == 0);
  }
  CHECK(fcntl(listener, F_SETFL, 0) == 0);
}

static void files(char *bad) {
  int file = open("/proc/self/exe", O_RDONLY);
  CHECK(file >= 0);
  TELL(sendfile(a, file, (off_t *)bad, bad == hole ? 100 : 0));
  CHECK(close(file) == 0);
}

/* Long buffers with the hole at their end: what was sent or received short arrives once, and in order. */
static void long_buffers(void) {
  static char block[PAGES * PAGE];
  for (size_t before = 1; before <= PAGES * PAGE; before = before * 5 + 3) {
    has_room(a);
    fill(hole - before, before);
    ssize_t n = send(a, hole - before, before + PAGE, MSG_DONTWAIT);
    int error = errno;
    CHECK(n == -1 ? error == EFAULT : n > 0 && (size_t)n <= before);
    if (n > 0) sent_to_b += (uint64_t)n;
    receive_rest();
    has_room(a);
    fill(block, before);
    n = send(a, block, before, MSG_DONTWAIT);
    CHECK(n > 0);
    sent_to_b += (uint64_t)n;
    arrives(b);
    for (size_t room = 1; room < before; room = room * 4 + 1) {
      n = recv(b, hole - room, before + PAGE, MSG_DONTWAIT);
      error = errno;
      CHECK(n == -1 ? error == EFAULT || error == EAGAIN : n > 0 && (size_t)n <= room);
      if (n > 0) check_got(hole - room, (size_t)n);
    }
    receive_rest();
  }
}

/* ---- the program's own faults ---- */

static sigjmp_buf back;
static volatile sig_atomic_t faults;
static void *volatile fault_address;
static volatile int on_own_stack;
static char own_stack[65536];

static void jump_back(int number, siginfo_t *info, void *context) {
  (void)number, (void)context;
  char here;
  faults++;
  fault_address = info->si_addr;
  on_own_stack = &here >= own_stack && &here < own_stack + sizeof own_stack;
  siglongjmp(back, 1);
}

static void plain_jump_back(int number) {
  (void)number;
  faults++;
  siglongjmp(back, 2);
}

static void make_good(int number, siginfo_t *info, void *context) { /* maps the page: the instruction is repeated */
  (void)number, (void)context;
  faults++;
  CHECK(mprotect((void *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE) == 0);
}

static void own_faults(void) {
  name = "own";
  stack_t stack = {.ss_sp = own_stack, .ss_size = sizeof own_stack};
  CHECK(sigaltstack(&stack, NULL) == 0);
  struct sigaction action = {.sa_sigaction = jump_back, .sa_flags = SA_SIGINFO | SA_ONSTACK}, old;
  CHECK(sigaction(SIGSEGV, &action, &old) == 0 && old.sa_handler == SIG_DFL && !(old.sa_flags & SA_SIGINFO));
  CHECK(sigaction(SIGBUS, &action, NULL) == 0);
  CHECK(sigaction(SIGSEGV, NULL, &old) == 0 && old.sa_sigaction == jump_back &&
        (old.sa_flags & (SA_SIGINFO | SA_ONSTACK)) == action.sa_flags);
  for (int round = 0; round < 3; round++) {
    if (!sigsetjmp(back, 1)) {
      *(volatile char *)(hole + 7) = 1;
      CHECK(!"a fault");
    }
    CHECK(faults == round + 1 && fault_address == hole + 7 && on_own_stack);
    TELL(send(a, hole, 5, 0)); /* not the handler's business */
    CHECK(faults == round + 1);
  }
  CHECK(signal(SIGSEGV, plain_jump_back) != SIG_ERR);
  if (!sigsetjmp(back, 1)) *(volatile char *)hole = 1;
  CHECK(faults == 4);
  TELL(send(a, hole, 5, 0));
  action = (struct sigaction){.sa_sigaction = make_good, .sa_flags = SA_SIGINFO};
  CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
  *(volatile char *)(fixed + 9) = 'x';
  CHECK(faults == 5 && fixed[9] == 'x');
  CHECK(mprotect(fixed, PAGE, PROT_READ) == 0);
  TELL(getsockname(a, (struct sockaddr *)fixed, &(socklen_t){16}));
  CHECK(faults == 5);
}

static void deaths(void) {
  name = "death";
  for (int how = 0; how < 5; how++) {
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
      sigset_t all;
      sigfillset(&all);
      signal(SIGSEGV, how == 3 ? SIG_IGN : SIG_DFL);
      if (how == 4) sigprocmask(SIG_SETMASK, &all, NULL);
      if (how >= 3) *(volatile char *)hole = 1;
      if (how == 0) *(volatile char *)hole = 1;
      if (how == 1) raise(SIGSEGV);
      struct sigaction once = {.sa_handler = plain_jump_back, .sa_flags = (int)SA_RESETHAND};
      sigaction(SIGSEGV, &once, NULL);
      sigsetjmp(back, 1);
      *(volatile char *)hole = 1;
      _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    printf("death %d: signal %d\n", how, WIFSIGNALED(status) ? WTERMSIG(status) : 0);
  }
}

/* Threads that block or ignore what a fault raises. */
static void *blocking(void *how) {
  name = how;
  sigset_t all, before, now;
  sigfillset(&all);
  CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
  for (int i = 0; i < 2; i++) {
    TELL(send(a, hole, 5, 0));
    TELL(connect(a, (struct sockaddr *)hole, 16));
    TELL(poll((struct pollfd *)hole, 1, 0));
    CHECK(pthread_sigmask(SIG_BLOCK, NULL, &now) == 0 && sigismember(&now, SIGSEGV) && sigismember(&now, SIGBUS));
  }
  send_good(100);
  CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
  return NULL;
}

static void in_handler(int number) {
  (void)number;
  TELL(send(a, hole, 5, 0));
}

static void blocked_faults(void) {
  pthread_t thread;
  blocking("blocked");
  CHECK(pthread_create(&thread, NULL, blocking, "thread") == 0 && pthread_join(thread, NULL) == 0);
  sigset_t all, before;
  sigfillset(&all);
  CHECK(sigprocmask(SIG_SETMASK, &all, &before) == 0); /* inherited by the next one */
  CHECK(pthread_create(&thread, NULL, blocking, "inherited") == 0 && pthread_join(thread, NULL) == 0);
  CHECK(sigprocmask(SIG_SETMASK, &before, NULL) == 0);
  name = "handler";
  struct sigaction action = {.sa_handler = in_handler}, old;
  sigfillset(&action.sa_mask);
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0 && raise(SIGUSR1) == 0);
  TELL(send(a, hole, 5, 0));
  name = "ignored";
  CHECK(signal(SIGSEGV, SIG_IGN) == SIG_DFL && raise(SIGSEGV) == 0);
  TELL(send(a, hole, 5, 0));
  CHECK(sigaction(SIGSEGV, NULL, &old) == 0 && old.sa_handler == SIG_IGN && !(old.sa_flags & SA_SIGINFO));
  CHECK(signal(SIGSEGV, SIG_DFL) == SIG_IGN);
  receive_rest();
}

int main(void) {
  alarm(60);
  setvbuf(stdout, NULL, _IOLBF, 0);
  memory();
  connect_both();
  char *const bad[] = {hole, fixed};
  for (int i = 0; i < 2; i++) {
    name = i ? "read-only" : "unmapped";
    if (!i) senders(bad[i]);
    receive_rest();
    receivers(bad[i]);
    names_and_options(bad[i]);
    readiness(bad[i]);
    accepting(bad[i]);
    files(bad[i]);
    receive_rest();
  }
  long_buffers();
  blocked_faults();
  deaths();
  own_faults();
  puts("ok");
  return 0;
}
