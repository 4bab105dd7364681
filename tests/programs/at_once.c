/* at_once: what a thread sends to a socket of its own is there when it looks, as over loopback TCP.  Prints how often. */
#include <sys/ioctl.h>

#include "pairs.h"

static void drain(int fd) {
  while (recv(fd, back, sizeof back, MSG_DONTWAIT) > 0) continue;
}

int main(void) {
  enum { TIMES = 1000 };
  struct pair p = pair();
  int received = 0, told = 0, polled = 0, waited = 0, count, set = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN};
  CHECK(epoll_ctl(set, EPOLL_CTL_ADD, p.b, &event) == 0);
  for (int i = 0; i < TIMES; i++) {
    CHECK(send(p.a, "x", 1, 0) == 1);
    received += recv(p.b, back, 1, MSG_DONTWAIT) == 1;
    drain(p.b);
    CHECK(send(p.a, "x", 1, 0) == 1);
    told += ioctl(p.b, FIONREAD, &count) == 0 && count == 1;
    drain(p.b);
    CHECK(send(p.a, "x", 1, 0) == 1);
    polled += poll(&(struct pollfd){.fd = p.b, .events = POLLIN}, 1, 0) == 1;
    drain(p.b);
    CHECK(send(p.a, "x", 1, 0) == 1);
    waited += epoll_wait(set, &event, 1, 0) == 1;
    drain(p.b);
  }
  printf("received %d, told %d, polled %d, waited %d of %d\n", received, told, polled, waited, TIMES);
  return 0;
}
