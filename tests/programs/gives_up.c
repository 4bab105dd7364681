/*
 * gives_up.c: gives a listener up while a signal comes whose handler does the same, or jumps out of the call.
 *
 *     gives_up PORT again|jump
 *
 * Says "ready", waits for a line, calls shutdown, and then what each call gave.
 */
#include <arpa/inet.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int listener;
static bool jumps;
static sigjmp_buf outside;

static void on_signal(int number) {
  (void)number;
  if (jumps) siglongjmp(outside, 1);
  shutdown(listener, SHUT_RDWR);
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  jumps = !strcmp(argv[2], "jump");
  setvbuf(stdout, NULL, _IOLBF, 0);
  struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
  sigaction(SIGUSR1, &action, NULL);
  listener = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1])) };
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 5)) {
    perror("listen");
    return 1;
  }
  printf("ready\n");
  getchar();
  if (sigsetjmp(outside, 1))
    printf("jumped\n");
  else
    printf("shutdown %d\n", shutdown(listener, SHUT_RDWR));
  printf("listen %d\n", listen(listener, 5));
  printf("close %d\n", close(listener));
  return 0;
}
