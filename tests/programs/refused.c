/* refused: calls with flags, lengths and pointers of which the kernel refuses some.  Prints what each gave. */
#include <limits.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pairs.h"

/* As many bytes as are there, thrown away. */
static void drain(int fd) {
  char bytes[4096];
  while (recv(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0) continue;
  errno = 0;
}

static void flags(int a, int b) {
  char bytes[16];
  send(a, "hello", 5, 0);
  TELL(recv(b, bytes, 9, MSG_ERRQUEUE | MSG_DONTWAIT));
  TELL(recv(b, bytes, 9, MSG_DONTWAIT));
  TELL(send(a, "x", 1, MSG_FASTOPEN));
  struct iovec piece = {bytes, 5};
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
  TELL(sendmsg(a, &message, INT_MIN));
  TELL(recvmsg(b, &message, INT_MIN | MSG_DONTWAIT));
  TELL(pwritev2(a, &piece, 1, -1, RWF_APPEND));
  TELL(read(b, (void *)-1, 0));
  int set = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN}, events[2];
  volatile int too_many = INT_MAX;
  TELL(epoll_wait(set, events, too_many, 0));
  epoll_ctl(set, EPOLL_CTL_ADD, b, &event);
  TELL(epoll_wait(set, events, too_many, 0));
  close(set);
  drain(b);
}

static void opens_fast(const struct sockaddr_in *to) {
  int fresh = socket(AF_INET, SOCK_STREAM, 0);
  TELL(send(fresh, "hello", 5, MSG_FASTOPEN));
  TELL(sendto(fresh, "hello", 5, MSG_FASTOPEN, (const struct sockaddr *)to, sizeof *to));
  TELL(sendto(fresh, "hello", 5, MSG_FASTOPEN, (const struct sockaddr *)to, sizeof *to));
  TELL(send(fresh, "hello", 5, 0));
  close(fresh);
}

static void control(int a, int b) {
  struct iovec piece = {"hello", 5};
  struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = (void *)8, .msg_controllen = 32};
  TELL(sendmsg(a, &message, 0));
  _Alignas(struct cmsghdr) char space[64] = {0};
  struct cmsghdr *c = (struct cmsghdr *)space;
  message.msg_control = space;
  TELL(sendmsg(a, &message, 0)); /* of length 0 */
  *c = (struct cmsghdr){.cmsg_len = 1000, .cmsg_level = IPPROTO_TCP};
  TELL(sendmsg(a, &message, 0));
  *c = (struct cmsghdr){.cmsg_len = 32, .cmsg_level = IPPROTO_TCP};
  TELL(sendmsg(a, &message, 0));
  *c = (struct cmsghdr){.cmsg_len = 32, .cmsg_level = SOL_SOCKET, .cmsg_type = 12345};
  TELL(sendmsg(a, &message, 0));
  *c = (struct cmsghdr){.cmsg_len = 32, .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
  TELL(sendmsg(a, &message, 0));
  message.msg_controllen = 8; /* less than one */
  TELL(sendmsg(a, &message, 0));
  message.msg_controllen = SIZE_MAX;
  TELL(sendmsg(a, &message, 0));
  message.msg_controllen = 0;
  struct sockaddr_storage name[4] = {{.ss_family = AF_INET}};
  message.msg_name = name;
  message.msg_namelen = 500;
  TELL(sendmsg(a, &message, 0));
  message.msg_namelen = (socklen_t)-1;
  TELL(sendmsg(a, &message, 0));
  drain(b);
}

static void files(int a, int b) {
  int channel[2], file = fileno(tmpfile());
  off64_t at = 0;
  off_t position = 0;
  if (pipe(channel) || write(file, "0123456789", 10) != 10 || write(channel[1], "piped", 5) != 5) return;
  TELL(splice(channel[0], NULL, a, NULL, 10, 0xff0));
  TELL(splice(b, NULL, channel[1], NULL, 5, 0xf0 | SPLICE_F_NONBLOCK));
  TELL(splice(channel[0], NULL, a, NULL, (size_t)-1, 0));
  TELL(splice(channel[0], NULL, a, (off64_t *)8, 10, 0));
  TELL(splice(channel[0], NULL, a, &at, 10, 0));
  TELL(splice(channel[0], &at, a, NULL, 10, 0));
  TELL(splice(file, (off64_t *)8, a, NULL, 10, 0));
  TELL(splice(file, NULL, a, NULL, 10, 0));
  TELL(sendfile(a, file, &position, (size_t)-1));
  TELL(sendfile(a, file, &position, (size_t)1 << 63));
  TELL(sendfile(a, channel[0], &position, 10));
  TELL(sendfile(a, file, &position, 10));
  drain(b);
  int zero = open("/dev/zero", O_RDONLY), directory = open("/", O_RDONLY);
  TELL(sendfile(a, zero, NULL, 10));
  position = 5;
  TELL(sendfile(a, zero, &position, 10));
  TELL(sendfile(a, directory, NULL, 10));
  drain(b);
}

static void modes(int a) {
  int on = 1, owner = 0;
  char name[32] = "";
  socklen_t length = sizeof name;
  TELL(fcntl(a, F_SETFL, O_APPEND | O_NONBLOCK));
  TELL(fcntl(a, F_GETFL));
  TELL(fcntl(a, F_SETFL, O_DIRECT));
  TELL(fcntl(a, F_GETFL));
  TELL(fcntl(a, F_SETFL, 0));
  TELL(fcntl(a, F_GETFL));
  owner = getpid();
  TELL(ioctl(a, SIOCSPGRP, &owner));
  TELL(fcntl(a, F_GETOWN) == getpid());
  owner = 0;
  TELL(ioctl(a, SIOCGPGRP, &owner));
  TELL(owner == getpid());
  TELL(ioctl(a, SIOCSPGRP, (void *)8));
  owner = INT_MAX;
  TELL(ioctl(a, FIOSETOWN, &owner));
  TELL(setsockopt(a, IPPROTO_TCP, TCP_CONGESTION, "no-such-control", 15));
  TELL(setsockopt(a, IPPROTO_TCP, TCP_CONGESTION, "", 0));
  TELL(setsockopt(a, IPPROTO_TCP, TCP_CONGESTION, "", 1));
  TELL(setsockopt(a, IPPROTO_TCP, TCP_CONGESTION, "reno", 4));
  TELL(getsockopt(a, IPPROTO_TCP, TCP_CONGESTION, name, &length));
  TELL(length);
  printf("%s\n", name);
  TELL(setsockopt(a, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on));
}

static void programs(void) {
  char *arguments[] = {"true", NULL}, *words[] = {(char *)8, NULL}, **volatile nowhere = (char **)8;
  TELL(execve("/bin/true", arguments, nowhere));
  TELL(execve("/nonexistent/program", arguments, nowhere));
  TELL(execve("/bin/true", arguments, words));
}

static void streams(int a) {
  FILE *stream = fdopen(a, "r");
  TELL(freopen("/dev/zero", "r", stream) == stream);
  TELL(fgetc(stream));
  TELL(fileno(stream) == a);
  TELL(fseek(stream, 0, SEEK_SET));
  FILE *file = tmpfile();
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fileno(file));
  TELL(freopen(path, "w", stream) == stream);
  TELL(fputs("text", stream));
  TELL(fflush(stream));
  TELL(lseek(fileno(file), 0, SEEK_END));
  TELL(freopen("/nonexistent/file", "r", stream) == NULL);
}

int main(void) {
  struct pair p = pair();
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  listening(&to, false);
  flags(p.a, p.b);
  opens_fast(&to);
  control(p.a, p.b);
  files(p.a, p.b);
  modes(p.a);
  programs();
  streams(p.a);
  return 0;
}
