/* control.c: what the daemon says, and what it is told.  See vmmc_attach.h. */
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "nic.h"

static volatile sig_atomic_t pending;
static bool hung_up; /* the daemon: nobody listens */

/* The daemon wrote, or hung up. */
static void on_message(int signal_number) {
  (void)signal_number;
  pending = 1;
  sleep_not();
}

void control_start(int fd) {
  /* No SA_RESTART: a sleeping NIC returns from its sleep and looks. */
  struct sigaction action = { .sa_handler = on_message };
  sigaction(SIGIO, &action, NULL);
  nic.control_fd = fd;
  fcntl(fd, F_SETOWN, getpid());
  fcntl(fd, F_SETFL, O_ASYNC | O_NONBLOCK);
  pending = 1; /* what came before */
}

bool control_has_work(void) { return pending; }

/* What found no room, since the daemon does not read: said in this order when there is some (SIGIO tells). */
static struct {
  struct vmmc_control *message;
  uint32_t count, room;
} outbox;

/* False: there is no room now. */
static bool say(const struct vmmc_control *m) {
  if (send(nic.control_fd, m, sizeof *m, MSG_NOSIGNAL) >= 0) return true;
  if (errno == EAGAIN) return false;
  log_event("warning", "telling the daemon (kind %u, endpoint %u): %s", m->kind, m->endpoint, strerror(errno));
  return true;
}

static void say_rest(void) {
  uint32_t said = 0;
  while (said < outbox.count && say(&outbox.message[said])) said++;
  outbox.count -= said;
  if (said) memmove(outbox.message, outbox.message + said, outbox.count * sizeof *outbox.message);
}

void control_say(uint32_t kind, uint32_t endpoint, uint32_t serial, int32_t value) {
  if (hung_up) return;
  struct vmmc_control message = { kind, endpoint, serial, value };
  if (nic.control_fd >= 0 && !outbox.count && say(&message)) return; /* before control_start it has to wait */
  if (outbox.count == outbox.room) {
    uint32_t room = outbox.room ? 2 * outbox.room : 64;
    void *larger = realloc(outbox.message, room * sizeof message);
    if (!larger) nic_end_for_memory("what the daemon is to hear");
    outbox.message = larger;
    outbox.room = room;
  }
  outbox.message[outbox.count++] = message;
}

union message {
  uint32_t kind; /* how each begins */
  struct vmmc_control control;
  struct vmmc_control_wire wire;
};

/* One message; the descriptor that came with it in *fd, -1 none.  False: nothing there. */
static bool control_receive(union message *message, int *fd) {
  union {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
  } ancillary;
  struct iovec vector = { message, sizeof *message };
  struct msghdr header = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                           .msg_controllen = sizeof ancillary.bytes };
  *fd = -1;
  ssize_t n = recvmsg(nic.control_fd, &header, MSG_CMSG_CLOEXEC);
  if (n < 0) return false;
  struct cmsghdr *c = CMSG_FIRSTHDR(&header);
  if (c && c->cmsg_type == SCM_RIGHTS) memcpy(fd, CMSG_DATA(c), sizeof *fd);
  if (n >= (ssize_t)sizeof message->kind)
    return n == (ssize_t)(message->kind == VMMC_CONTROL_WIRE ? sizeof message->wire : sizeof message->control);
  if (n == 0) { /* the daemon is gone: work goes on, without control */
    log_event("warning", "the daemon hung up; traffic goes on");
    close(nic.control_fd);
    nic.control_fd = -1;
    hung_up = true;
  }
  return false;
}

int control_work(void) {
  enum { SHARE = 64 };
  int done = 0, fd;
  union message message;
  if (!pending || nic.control_fd < 0) return 0;
  pending = 0;
  say_rest();
  /* A program can have its daemon say much: then others have their turn, and it goes on. */
  while (nic.control_fd >= 0 && done < SHARE && control_receive(&message, &fd)) {
    const struct vmmc_control m = message.control;
    done++;
    switch (m.kind) {
      case VMMC_CONTROL_LOST: link_lost((uint32_t)m.value, m.serial); break;
      case VMMC_CONTROL_WIRE: wire_set(&message.wire); break;
      case VMMC_CONTROL_ATTACH: endpoint_attach(m.endpoint, m.serial, m.value); break;
      case VMMC_CONTROL_DETACH: endpoint_detach(m.endpoint, m.serial, m.value); break;
      case VMMC_CONTROL_WAKER:
        endpoint_waker(m.endpoint, m.serial, (uint32_t)m.value, fd);
        fd = -1;
        break;
      default: log_event("warning", "unknown message %u from the daemon", m.kind);
    }
    if (fd >= 0) close(fd);
  }
  if (done == SHARE) pending = 1;
  return done;
}
