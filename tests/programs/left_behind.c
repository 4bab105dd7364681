/*
 * left_behind: what a peer finds after the other end's program has ended, or has closed, at a moment when not all was
 * sent or SO_LINGER asks for a reset.  Prints it.
 *
 *     left_behind               plays the peer, and starts itself again for the other end
 *     left_behind PORT HOW
 */
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "pairs.h"

static const char *const ends[] = {"exit", "kill", "exec", "linger-exit", "linger-kill", "linger-exec", "linger-off",
                                   "blocked", "closed", "shut"};

static void end(const char *port, const char *how) {
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                           .sin_port = (in_port_t)atoi(port)};
  int fd = connected(&to);
  struct linger now = {1, 0}, off = {0, 0};
  if (!strncmp(how, "linger", 6)) CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
  if (!strcmp(how, "linger-off")) CHECK(setsockopt(fd, SOL_SOCKET, SO_LINGER, &off, sizeof off) == 0);
  if (!strcmp(how, "blocked") || !strcmp(how, "closed") || !strcmp(how, "shut")) {
    while (send(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0 || poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, 200) == 1)
      continue;
    if (!strcmp(how, "closed")) close(fd);
    if (!strcmp(how, "shut")) shutdown(fd, SHUT_RDWR);
  }
  CHECK(write(1, "r", 1) == 1); /* ready */
  CHECK(read(0, bytes, 1) == 1);
  if (strstr(how, "exec")) execl("/bin/true", "true", (char *)NULL);
  if (strstr(how, "kill") || !strcmp(how, "blocked")) kill(getpid(), SIGKILL);
  if (strstr(how, "exit") || !strcmp(how, "linger-off")) exit(0);
  pause(); /* with what it closed or shut down */
}

static void meet(const char *how) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int listener = listening(&address, false), in[2], out[2];
  char port[16];
  snprintf(port, sizeof port, "%d", address.sin_port);
  CHECK(pipe(in) == 0 && pipe(out) == 0);
  fflush(stdout);
  pid_t child = fork();
  if (!child) {
    dup2(in[0], 0);
    dup2(out[1], 1);
    execl("/proc/self/exe", "left_behind", port, how, (char *)NULL);
    _exit(127);
  }
  int fd = accept(listener, NULL, NULL);
  bool lives = !strcmp(how, "closed") || !strcmp(how, "shut");
  printf("%s\n", how);
  CHECK(read(out[0], bytes, 1) == 1 && write(in[1], "g", 1) == 1);
  if (!lives) waitpid(child, NULL, 0);
  bool unsent = lives || !strcmp(how, "blocked");
  if (unsent) TELL(send(fd, "x", 1, MSG_NOSIGNAL)); /* which nobody reads any more */
  struct pollfd look = {.fd = fd, .events = unsent ? 0 : POLLIN};
  TELL(poll(&look, 1, 20000));
  printf("%x\n", (unsigned)look.revents);
  if (!unsent) TELL(recv(fd, bytes, 1, MSG_DONTWAIT));
  else TELL(send(fd, "x", 1, MSG_NOSIGNAL));
  close(fd);
  close(listener);
  if (lives) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
  }
}

int main(int count, char **argument) {
  if (count > 2) {
    end(argument[1], argument[2]);
    return 1;
  }
  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) meet(ends[i]);
  return 0;
}
