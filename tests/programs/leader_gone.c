/*
 * leader_gone.c: the first thread ends, and another one uses sockets.
 *
 * It connects to itself, closes all descriptors but its own and the standard ones, and passes a byte.  Says the
 * result of each call, then "ready", and waits for a line.
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static pthread_t first;

static void *rest(void *unused) {
  (void)unused;
  pthread_join(first, NULL);
  int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
  socklen_t length = sizeof address;
  printf("bind %d\n", bind(listener, (void *)&address, sizeof address));
  printf("listen %d\n", listen(listener, 1));
  getsockname(listener, (void *)&address, &length);
  printf("connect %d\n", connect(client, (void *)&address, sizeof address));
  int accepted = accept(listener, NULL, NULL);
  int last = listener > client ? listener : client;
  if (accepted > last) last = accepted;
  printf("close_range %d\n", close_range((unsigned)last + 1, ~0u, 0));
  char byte = 'x';
  printf("send %zd\n", send(client, &byte, 1, 0));
  printf("recv %zd\n", recv(accepted, &byte, 1, 0));
  printf("ready\n");
  fflush(stdout);
  getchar();
  exit(0);
}

int main(void) {
  pthread_t other;
  first = pthread_self();
  if (pthread_create(&other, NULL, rest, NULL)) return 1;
  pthread_exit(NULL);
}
