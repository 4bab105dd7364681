/* A program that makes its socket calls by number, through syscall(): a connection to itself from first to last. */
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "check.h"

int main(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t length = sizeof address;
  int listener = (int)syscall(SYS_socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  CHECK(listener >= 0);
  CHECK(syscall(SYS_bind, listener, &address, length) == 0);
  CHECK(syscall(SYS_listen, listener, 5) == 0);
  CHECK(syscall(SYS_getsockname, listener, &address, &length) == 0 && address.sin_port);
  int client = (int)syscall(SYS_socket, AF_INET, SOCK_STREAM, 0);
  CHECK(syscall(SYS_connect, client, &address, length) == 0);
  int server = (int)syscall(SYS_accept4, listener, NULL, NULL, SOCK_NONBLOCK);
  CHECK(server >= 0);
  CHECK_FAILS(syscall(SYS_close, 12345), EBADF);

  char bytes[64];
  CHECK_FAILS(syscall(SYS_read, server, bytes, sizeof bytes), EAGAIN);
  CHECK(syscall(SYS_fcntl, server, F_SETFL, 0) == 0);
  int epoll = (int)syscall(SYS_epoll_create1, 0);
  struct epoll_event event = {.events = EPOLLIN, .data.u32 = 7};
  CHECK(syscall(SYS_epoll_ctl, epoll, EPOLL_CTL_ADD, server, &event) == 0);
  CHECK(syscall(SYS_write, client, "one", 3) == 3);
  CHECK(syscall(SYS_epoll_pwait, epoll, &event, 1, -1, NULL, 8) == 1 && event.data.u32 == 7);
  CHECK(syscall(SYS_recvfrom, server, bytes, sizeof bytes, MSG_PEEK, NULL, NULL) == 3);
  CHECK(syscall(SYS_read, server, bytes, sizeof bytes) == 3);
  CHECK(syscall(SYS_sendto, server, "two", 3, 0, NULL, 0) == 3);
  struct pollfd set = {.fd = client, .events = POLLIN};
  CHECK(syscall(SYS_ppoll, &set, 1, NULL, NULL, 8) == 1 && set.revents == POLLIN);
  struct iovec vector[] = {{bytes, 1}, {bytes + 1, 5}};
  CHECK(syscall(SYS_readv, client, vector, 2) == 3 && !memcmp(bytes, "two", 3));

  int copy = (int)syscall(SYS_dup, client), type = 0;
  length = sizeof type;
  CHECK(syscall(SYS_getsockopt, copy, SOL_SOCKET, SO_TYPE, &type, &length) == 0 && type == SOCK_STREAM);
  CHECK(syscall(SYS_close, client) == 0);
  CHECK(syscall(SYS_shutdown, copy, SHUT_WR) == 0);
  CHECK(syscall(SYS_read, server, bytes, sizeof bytes) == 0);
  CHECK(syscall(SYS_close, copy) == 0 && syscall(SYS_close, server) == 0 && syscall(SYS_close, listener) == 0);
  CHECK_FAILS(syscall(SYS_read, server, bytes, sizeof bytes), EBADF);
  CHECK(syscall(SYS_getpid) == getpid()); /* and all others are as they were */
  puts("ok");
  return 0;
}
