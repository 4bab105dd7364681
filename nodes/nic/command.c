/* command.c: VMMC commands of programs: each is copied once, checked, carried out and answered. */
#include <string.h>

#include "nic.h"

static void answer(struct endpoint *e, uint64_t index, int error, uint32_t id, uint64_t length, uint32_t permissions) {
  struct vmmc_completion *done = (struct vmmc_completion *)(e->nic + VMMC_NIC_COMPLETIONS) + index % VMMC_COMMANDS;
  if (error) COUNT(e, commands_rejected, 1);
  done->error = error;
  done->id = id;
  done->length = length;
  done->permissions = permissions;
  /* release: the answer before what says that it is there */
  atomic_store_explicit(&done->done, index + 1, memory_order_release);
}

void command_complete(struct endpoint *e, uint64_t index, int error, uint32_t id, uint64_t length,
                      uint32_t permissions) {
  answer(e, index, error, id, length, permissions);
  in_order(); /* a command is forgotten when it is answered, see commands_recover */
  e->own->command[index % VMMC_COMMANDS].state = COMMAND_NONE;
  wake_completion(e);
}

/* Answers that need a peer: the command waits in its link's queue. */
static int to_peer(struct endpoint *e, struct own_command *own, uint32_t node) {
  struct link *link = link_to(node);
  if (!link) return errno;
  in_order();
  own->state = COMMAND_WAITS;
  link_enqueue(link, &e->command[own - e->own->command].work);
  return 0;
}

static int start_transfer(struct endpoint *e, struct own_command *own) {
  const struct vmmc_command *c = &own->command;
  if (c->import_id >= VMMC_EXPORTS || !e->own->import[c->import_id].used) return EPERM; /* nothing imported */
  own->import = e->own->import[c->import_id];
  own->moved = 0;
  uint32_t needed = c->op == VMMC_OP_SEND ? VMMC_PERMIT_WRITE : VMMC_PERMIT_READ;
  if (!(own->import.permissions & needed)) return EPERM;
  if (c->remote_offset > own->import.length || c->length > own->import.length - c->remote_offset) return EINVAL;
  uint64_t end = c->remote_offset + c->length;
  if (c->notify_length && (c->notify_length < c->length || c->notify_length > end)) return EINVAL;
  if (c->offset > VMMC_HEAP_BYTES || c->length > VMMC_HEAP_BYTES - c->offset) return EFAULT;
  own->after = 0;
  if (c->op == VMMC_OP_SEND) { /* sends to one node arrive in the order in which they were given */
    own->after = e->last_send[own->import.node];
    e->last_send[own->import.node] = c->index + 1;
  }
  return to_peer(e, own, own->import.node);
}

static int start_import(struct endpoint *e, struct own_command *own) {
  if (own->command.node >= nic.nodes) return EHOSTUNREACH;
  return to_peer(e, own, own->command.node);
}

void command_begin(struct own_command *own) {
  own->effected = own->command.index + 1;
  in_order();
}

static int end_import(struct endpoint *e, struct own_command *own) {
  uint32_t id = own->command.import_id;
  if (id >= VMMC_EXPORTS) return ENOENT;
  if (!e->own->import[id].used) return own->effected == own->command.index + 1 ? 0 : ENOENT;
  command_begin(own);
  e->own->import[id].used = 0;
  return 0;
}

static bool answered(struct endpoint *e, uint64_t index) {
  struct vmmc_completion *c = (struct vmmc_completion *)(e->nic + VMMC_NIC_COMPLETIONS) + index % VMMC_COMMANDS;
  return atomic_load_explicit(&c->done, memory_order_relaxed) == index + 1;
}

/* Returns how much work it was: an export is looked for among all names of the node. */
static int take(struct endpoint *e, uint64_t index) {
  enum { COMMAND = 1, NAME = 16 };
  struct own_command *own = &e->own->command[index % VMMC_COMMANDS];
  const struct vmmc_command *shared = (const struct vmmc_command *)(e->app + VMMC_APP_COMMANDS) + index % VMMC_COMMANDS;
  /* A predecessor took it, and was killed before it had counted it. */
  if (answered(e, index) || (own->state != COMMAND_NONE && own->command.index == index)) return COMMAND;
  if (own->state != COMMAND_NONE) { /* the queue was overrun: the answer owed goes first */
    COUNT(e, commands_rejected, 1);
    return COMMAND;
  }
  memcpy(&own->command, (const void *)shared, sizeof own->command); /* the copy that is checked and used */
  own->command.index = index;
  const struct vmmc_command *c = &own->command;
  int error;
  switch (c->op) {
    case VMMC_OP_NOP: error = 0; break;
    case VMMC_OP_EXPORT: error = export_make(e, own); break;
    case VMMC_OP_UNEXPORT: error = export_end(e, own); break;
    case VMMC_OP_IMPORT: error = start_import(e, own); break;
    case VMMC_OP_UNIMPORT: error = end_import(e, own); break;
    case VMMC_OP_SEND:
    case VMMC_OP_FETCH: error = start_transfer(e, own); break;
    default: error = EINVAL;
  }
  if (error || own->state == COMMAND_NONE) command_complete(e, index, error, 0, 0, 0);
  return c->op == VMMC_OP_EXPORT ? NAME : COMMAND;
}

/* What answers and arrivals are told in: the library has seen to it that there is room. */
static bool commit_answers(struct endpoint *e) {
  uint64_t end = VMMC_NIC_NOTIFICATIONS + VMMC_NOTIFICATIONS * sizeof(struct vmmc_notification);
  return segment_commit(e->nic_fd, VMMC_NIC_COMPLETIONS, end - VMMC_NIC_COMPLETIONS);
}

/* And what commands are remembered in. */
static bool commit_tables(struct endpoint *e) {
  if (!e->vmmc_committed)
    e->vmmc_committed = commit_answers(e) && segment_commit(e->own_fd, 0, offsetof(struct own, connection));
  return e->vmmc_committed;
}

int commands_work(struct endpoint *e) {
  enum { SHARE = 64 }; /* of work, before others have their turn */
  /* acquire: the commands that it counts */
  uint64_t tail = atomic_load_explicit(&app_header(e)->command_tail, memory_order_acquire);
  if (tail == e->commands_taken) return 0;
  core_asked();
  bool room = commit_tables(e);
  if (!room && !commit_answers(e)) {
    e->wrong = "no room in /dev/shm for answers to its commands";
    return 1;
  }
  int done = 0;
  if (tail - e->commands_taken > VMMC_COMMANDS) { /* also a count that went back: which command is next? */
    e->wrong = "an impossible number of commands";
    return 1;
  }
  while (e->commands_taken != tail && done < SHARE) {
    if (room) {
      done += take(e, e->commands_taken);
    } else {
      answer(e, e->commands_taken, ENOBUFS, 0, 0, 0);
      wake_completion(e);
      done++;
    }
    e->commands_taken++;
    atomic_store_explicit(&nic_header(e)->commands_taken, e->commands_taken, memory_order_release);
  }
  return done;
}

static void imported(struct endpoint *e, struct own_command *own, const struct packet *p) {
  uint64_t index = own->command.index;
  if (p->error) {
    command_complete(e, index, p->error, 0, 0, 0);
    return;
  }
  uint32_t id = own->command.import_id; /* that a predecessor chose, who was killed before it could answer */
  if (own->effected != index + 1)
    for (id = 0; id < VMMC_EXPORTS && e->own->import[id].used; id++);
  if (id >= VMMC_EXPORTS) {
    command_complete(e, index, ENOBUFS, 0, 0, 0);
    return;
  }
  own->command.import_id = id;
  in_order();
  command_begin(own);
  e->own->import[id] = (struct own_import){ 1, own->command.node, p->from, p->total, p->flags };
  command_complete(e, index, 0, id, p->total, p->flags);
}

void command_packet(const struct packet *p) {
  struct endpoint *e = endpoint_find(p->to.endpoint, p->to.serial);
  struct own_command *own = e ? &e->own->command[p->command % VMMC_COMMANDS] : NULL;
  if (!e || e->dying || own->state == COMMAND_NONE || own->command.index != p->command) {
    COUNT_NODE(packets_dropped, 1);
    return;
  }
  switch (p->type) {
    case PACKET_IMPORTED: imported(e, own, p); break;
    case PACKET_SENT: command_complete(e, p->command, p->error, 0, p->error ? 0 : own->command.length, 0); break;
    case PACKET_FETCHED: transfer_fetched(e, p); break;
    default: break;
  }
}

static uint32_t command_node(const struct own_command *own) {
  return own->command.op == VMMC_OP_IMPORT ? own->command.node : own->import.node;
}

/* What is unanswered by a node whose NIC died is said again. */
void command_retell(struct endpoint *e, uint32_t node) {
  if (!e->vmmc_committed) return;
  struct link *link = NULL;
  for (uint32_t i = 0; i < VMMC_COMMANDS; i++) {
    struct own_command *own = &e->own->command[i];
    if (own->state == COMMAND_NONE || command_node(own) != node) continue;
    if (!(link = link_to(node))) { /* it is off */
      command_complete(e, own->command.index, errno, 0, 0, 0);
      continue;
    }
    own->state = COMMAND_WAITS;
    if (own->command.op == VMMC_OP_SEND) own->moved = 0;
    link_enqueue(link, &e->command[i].work);
  }
}

/* That node was given up as unreachable: whatever it was asked for and has not answered. */
void commands_given_up(struct endpoint *e, uint32_t node) {
  if (!e->vmmc_committed) return;
  for (uint32_t i = 0; i < VMMC_COMMANDS; i++) {
    struct own_command *own = &e->own->command[i];
    if (own->state == COMMAND_NONE || command_node(own) != node) continue;
    command_complete(e, own->command.index, ETIMEDOUT, 0, 0, 0);
  }
}

/* A predecessor may have been killed at any point of any command. */
void commands_recover(struct endpoint *e) {
  e->commands_taken = atomic_load_explicit(&nic_header(e)->commands_taken, memory_order_relaxed);
  if (!atomic_load_explicit(&app_header(e)->command_tail, memory_order_relaxed) || !commit_tables(e)) return;
  for (uint32_t i = 0; i < VMMC_COMMANDS; i++) {
    struct own_command *own = &e->own->command[i];
    if (own->state == COMMAND_NONE) continue;
    if (answered(e, own->command.index)) {
      own->state = COMMAND_NONE;
    } else if (own->command.op == VMMC_OP_SEND) {
      uint64_t *last = &e->last_send[own->import.node];
      if (*last <= own->command.index) *last = own->command.index + 1;
    }
  }
  for (uint32_t id = 0; id < VMMC_EXPORTS; id++) {
    if (!e->own->export[id].used) continue;
    struct redirection r = redirection_of_export(e, id);
    redirect_recover(&r, UINT64_MAX); /* what is said to be redirected was copied: `to` follows the bytes */
  }
  transfer_recover(e);
  for (uint32_t node = 0; node < nic.nodes; node++) command_retell(e, node);
  wake_completion(e);
  wake_notification(e);
}
