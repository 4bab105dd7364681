/* A signal handler makes the calls that POSIX lets it make on sockets, while the code that it interrupts is in
 * those same calls on the same sockets: nothing deadlocks and no byte is lost. */
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/time.h>

#include "check.h"

enum { ROUNDS = 20000 };

static int pair[2], epoll;
static volatile sig_atomic_t handlers, sent, wrong;

static void handler(int signal) {
  int error = errno;
  struct pollfd set[] = {{.fd = pair[0], .events = POLLIN | POLLOUT}, {.fd = pair[1], .events = POLLOUT}};
  if (poll(set, 2, 0) < 0) wrong = __LINE__;
  if (send(pair[0], "h", 1, MSG_DONTWAIT) == 1) sent++;
  int copy = dup(pair[1]);
  if (copy < 0 || close(copy) < 0) wrong = __LINE__;
  int fresh = socket(AF_INET, SOCK_STREAM, 0);
  if (fresh < 0 || close(fresh) < 0) wrong = __LINE__;
  struct sockaddr_in name;
  socklen_t length = sizeof name;
  if (getpeername(pair[0], (struct sockaddr *)&name, &length) < 0) wrong = __LINE__;
  handlers++;
  (void)signal;
  errno = error;
}

static int once;
static void handler_once(int signal) {
  (void)signal;
  once++;
}

int main(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof address;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 5) == 0);
  CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
  pair[0] = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(connect(pair[0], (struct sockaddr *)&address, length) == 0);
  pair[1] = accept(listener, NULL, NULL);
  epoll = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN};
  CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, pair[1], &event) == 0);

  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
  CHECK(sigaction(SIGALRM, &action, NULL) == 0);
  struct itimerval often = {{0, 50}, {0, 50}}, never = {{0, 0}, {0, 0}};
  CHECK(setitimer(ITIMER_REAL, &often, NULL) == 0);
  long mine = 0, got = 0;
  char bytes[512];
  for (int round = 0; round < ROUNDS || handlers < 100; round++) {
    ssize_t n = send(pair[0], "m", 1, MSG_DONTWAIT);
    if (n == 1) mine++;
    while ((n = recv(pair[1], bytes, sizeof bytes, MSG_DONTWAIT)) > 0) got += n;
    CHECK(epoll_wait(epoll, &event, 1, 0) >= 0);
    event.events = EPOLLIN;
    CHECK(epoll_ctl(epoll, EPOLL_CTL_DEL, pair[1], NULL) == 0);
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, pair[1], &event) == 0);
    int copy = dup(pair[0]);
    CHECK(copy >= 0 && close(copy) == 0);
  }
  CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
  CHECK(shutdown(pair[0], SHUT_WR) == 0);
  for (ssize_t n; (n = recv(pair[1], bytes, sizeof bytes, 0)) > 0;) got += n;
  CHECK(wrong == 0 && got == mine + sent);

  /* What a handler is told of itself, and one that is to run once. */
  CHECK(sigaction(SIGALRM, NULL, &old) == 0 && old.sa_handler == handler && old.sa_flags & SA_RESTART);
  action = (struct sigaction){.sa_handler = handler_once, .sa_flags = (int)SA_RESETHAND};
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  CHECK(sigaction(SIGUSR1, NULL, &old) == 0 && old.sa_handler == handler_once && old.sa_flags & (int)SA_RESETHAND);
  CHECK(raise(SIGUSR1) == 0 && once == 1);
  CHECK(sigaction(SIGUSR1, NULL, &old) == 0 && old.sa_handler == SIG_DFL);
  puts("ok");
  return 0;
}
