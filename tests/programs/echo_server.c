/* Echoes what each client sends, a thread a client.  Says "listening PORT".   echo_server [PORT] */
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>

#include "check.h"

static void *serve(void *argument) {
  int fd = (int)(intptr_t)argument;
  static _Thread_local char block[65536];
  ssize_t n;
  while ((n = recv(fd, block, sizeof block, 0)) > 0) {
    for (ssize_t done = 0, sent; done < n; done += sent) {
      sent = send(fd, block + done, (size_t)(n - done), MSG_NOSIGNAL);
      if (sent < 0) goto over; /* the client has gone */
    }
  }
over:
  close(fd);
  return NULL;
}

int main(int argc, char **argv) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? (uint16_t)atoi(argv[1]) : 0)};
  socklen_t length = sizeof address;
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  CHECK(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0);
  CHECK(bind(listener, (struct sockaddr *)&address, length) == 0);
  CHECK(listen(listener, 128) == 0);
  CHECK(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
  printf("listening %d\n", ntohs(address.sin_port));
  fflush(stdout);
  for (;;) {
    int fd = accept(listener, NULL, NULL);
    CHECK(fd >= 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd) == 0);
    CHECK(pthread_detach(thread) == 0);
  }
}
