/*
 * transfer.c: commands to the NIC and their answers; send and fetch.
 *
 * An operation is one command, or a transfer, which is cut into several when its memory cannot all be
 * pinned at once.  Operations are posted in the order in which they came; the NIC may answer in any
 * order.  Whoever calls does the work: takes answers, lets go of the memory that they were about, and
 * posts what there is room for now.
 */
#include <errno.h>
#include <string.h>

#include "vmmc_private.h"

/* vmmc.h, which users read, and the layout, which the NIC reads, say the same. */
_Static_assert((int)VMMC_WRITE == (int)VMMC_PERMIT_WRITE && (int)VMMC_READ == (int)VMMC_PERMIT_READ,
               "permissions");
_Static_assert((int)VMMC_NOTIFY == (int)VMMC_SEND_NOTIFY && (uint32_t)VMMC_ANYONE == VMMC_ANY_NODE, "flags");
_Static_assert((int)VMMC_NAME_BYTES == (int)VMMC_NAME_MAX, "names");

void commands_start(struct vmmc_endpoint *v) {
  struct commands *c = &v->commands;
  c->head = c->tail = atomic_load_explicit(&app_header(v->endpoint)->command_tail, memory_order_relaxed);
  for (int i = OPERATIONS - 1; i >= 0; i--) {
    c->operation[i].next = c->free;
    c->free = &c->operation[i];
  }
}

static bool is_transfer(const struct operation *o) {
  return o->command.op == VMMC_OP_SEND || o->command.op == VMMC_OP_FETCH;
}

/* ---- answers ---- */

/* Turns a finished command that nobody waits for into the one that undoes it; false: nothing to undo. */
static bool operation_undo(struct vmmc_endpoint *v, struct operation *o) {
  if (o->error || (o->command.op != VMMC_OP_EXPORT && o->command.op != VMMC_OP_IMPORT)) return false;
  struct vmmc_command undo = {.op = VMMC_OP_UNEXPORT, .export_id = o->command.export_id};
  if (o->command.op == VMMC_OP_IMPORT)
    undo = (struct vmmc_command){.op = VMMC_OP_UNIMPORT, .import_id = o->id};
  o->command = undo;
  o->all_posted = o->finished = false;
  o->next = NULL;
  *(v->commands.first ? &v->commands.last->next : &v->commands.first) = o;
  v->commands.last = o;
  return true;
}

static void operation_finish(struct vmmc_endpoint *v, struct operation *o) {
  uint32_t op = o->command.op;
  if ((op == VMMC_OP_EXPORT && o->error) || op == VMMC_OP_UNEXPORT) export_gone(v, o->command.export_id);
  if (op == VMMC_OP_IMPORT && !o->error) import_known(v, o->id, true, o->length);
  if (op == VMMC_OP_UNIMPORT && !o->error) import_known(v, o->command.import_id, false, 0);
  o->finished = true;
  if (o->forgotten && !operation_undo(v, o)) operation_end(v, o);
}

static void commands_answered(struct vmmc_endpoint *v) {
  struct commands *c = &v->commands;
  const struct vmmc_completion *completions = (const void *)(v->endpoint->nic + VMMC_NIC_COMPLETIONS);
  for (uint64_t index = c->head; index != c->tail; index++) {
    struct place *place = &c->place[index % VMMC_COMMANDS];
    const struct vmmc_completion *completion = &completions[index % VMMC_COMMANDS];
    /* acquire: pairs with the NIC's release: the answer, and for a fetch the bytes, are there */
    if (!place->operation || atomic_load_explicit(&completion->done, memory_order_acquire) != index + 1)
      continue;
    struct operation *o = place->operation;
    utlb_release(v, place->offset, place->length);
    *place = (struct place){0};
    o->outstanding--;
    o->length += completion->length;
    o->id = completion->id;
    o->permissions = completion->permissions;
    if (completion->error && !o->error) o->error = completion->error;
    if (o->all_posted && !o->outstanding) operation_finish(v, o);
  }
  while (c->head != c->tail && !c->place[c->head % VMMC_COMMANDS].operation) c->head++;
}

/* ---- posting ---- */

/* Cuts the next piece off a transfer and pins its memory.  0; EAGAIN: no room now, but there will be;
 * another errno: it cannot be done. */
static int piece_cut(struct vmmc_endpoint *v, struct operation *o, struct vmmc_command *piece) {
  uint64_t left = o->command.length - o->posted, most = v->utlb.limit * VMMC_PAGE / 2;
  if (most < VMMC_PAGE) most = VMMC_PAGE;
  uint64_t want = left > most ? most : left;
  uint64_t offset = o->command.offset + o->posted;
  int error;
  uint64_t held = utlb_hold(v, offset, want, &error);
  if (error) return error;
  /* Less than wanted: let those under way end and give their memory back.  When there are none, what
   * exports and redirections leave is all that there will be, and smaller pieces must do. */
  if (held < want && (held == 0 || v->commands.head != v->commands.tail)) {
    utlb_release(v, offset, held);
    return v->commands.head != v->commands.tail ? EAGAIN : ENOMEM;
  }
  bool last = held == left;
  piece->offset = offset;
  piece->remote_offset = o->command.remote_offset + o->posted;
  piece->length = held;
  if (!last && o->command.op == VMMC_OP_SEND) piece->flags = VMMC_SEND_MORE;
  if (last && o->posted) piece->notify_length = o->command.length;
  return 0;
}

/* Posts one command of an operation; false: there is no room now. */
static bool operation_post(struct vmmc_endpoint *v, struct operation *o) {
  struct commands *c = &v->commands;
  struct place *place = &c->place[c->tail % VMMC_COMMANDS];
  if (place->operation) return false;
  if (o->error) { /* an earlier piece failed */
    o->all_posted = true;
    return true;
  }
  struct vmmc_command command = o->command;
  command.index = c->tail;
  if (is_transfer(o)) {
    int error = piece_cut(v, o, &command);
    if (error == EAGAIN) return false;
    if (error) {
      o->error = error;
      o->all_posted = true;
      return true;
    }
    o->posted += command.length;
    *place = (struct place){o, command.offset, command.length};
    o->all_posted = o->posted == o->command.length;
  } else {
    *place = (struct place){o, 0, 0};
    o->all_posted = true;
  }
  o->outstanding++;
  struct vmmc_command *queue = (struct vmmc_command *)(v->endpoint->app + VMMC_APP_COMMANDS);
  queue[c->tail % VMMC_COMMANDS] = command;
  c->tail++;
  /* release: the NIC finds the command, and what is to be sent, behind the position */
  atomic_store_explicit(&app_header(v->endpoint)->command_tail, c->tail, memory_order_release);
  return true;
}

void commands_advance(struct vmmc_endpoint *v) {
  struct commands *c = &v->commands;
  commands_answered(v);
  uint64_t before = c->tail;
  while (c->first && operation_post(v, c->first)) {
    struct operation *o = c->first;
    if (!o->all_posted) continue;
    c->first = o->next;
    if (!o->outstanding) operation_finish(v, o); /* it failed before anything was posted */
  }
  if (c->tail != before) endpoint_ring_commands(v->endpoint);
}

/* ---- operations ---- */

struct operation *operation_begin(struct vmmc_endpoint *v, const struct vmmc_command *command) {
  struct commands *c = &v->commands;
  if (!c->free) commands_advance(v);
  struct operation *o = c->free;
  if (!o) return NULL;
  c->free = o->next;
  uint32_t generation = (o->generation + 1) & INT32_MAX;
  *o = (struct operation){.command = *command, .generation = generation ? generation : 1, .used = true};
  *(c->first ? &c->last->next : &c->first) = o;
  c->last = o;
  commands_advance(v);
  return o;
}

void operation_end(struct vmmc_endpoint *v, struct operation *o) {
  o->used = false;
  o->next = v->commands.free;
  v->commands.free = o;
}

void operation_forget(struct vmmc_endpoint *v, struct operation *o) {
  o->forgotten = true;
  if (o->finished && !operation_undo(v, o)) operation_end(v, o);
  commands_advance(v);
}

struct awaited {
  struct vmmc_endpoint *v;
  struct operation *operation;
  uint32_t generation;
};

/* Another thread may have waited for it too, or forgotten it.  The lock is held. */
static bool operation_is_over(const struct operation *o, uint32_t generation) {
  return !o->used || o->forgotten || o->generation != generation;
}

static bool operation_is_finished(void *context) {
  struct awaited *awaited = context;
  pthread_mutex_lock(&awaited->v->lock);
  commands_advance(awaited->v);
  bool finished = awaited->operation->finished || operation_is_over(awaited->operation, awaited->generation);
  pthread_mutex_unlock(&awaited->v->lock);
  return finished;
}

static int operation_wait(struct vmmc_endpoint *v, struct operation *o, uint32_t generation, int timeout_ms) {
  struct awaited awaited = {v, o, generation};
  struct wait_word words[] = {
      {&nic_header(v->endpoint)->wake_completion, &app_header(v->endpoint)->asleep_completion},
      {&v->notifier.changed, &v->notifier.asleep}, /* forgotten, by another thread */
  };
  return call_wait(v, words, 2, operation_is_finished, &awaited, timeout_ms);
}

int operation_run(struct vmmc_endpoint *v, const struct vmmc_command *command, int timeout_ms,
                  struct operation *answer) {
  pthread_mutex_lock(&v->lock);
  struct operation *o = operation_begin(v, command);
  pthread_mutex_unlock(&v->lock);
  if (!o) return EAGAIN;
  int error = operation_wait(v, o, o->generation, timeout_ms);
  pthread_mutex_lock(&v->lock);
  if (error) {
    operation_forget(v, o);
  } else {
    *answer = *o;
    error = o->error;
    operation_end(v, o);
  }
  pthread_mutex_unlock(&v->lock);
  return error;
}

/* ---- send and fetch ---- */

static int64_t transfer_number(const struct vmmc_endpoint *v, const struct operation *o) {
  return (int64_t)o->generation << 32 | (o - v->commands.operation);
}

/* NULL: no such transfer is under way, or it was waited for already. */
static struct operation *transfer_find(struct vmmc_endpoint *v, int64_t transfer) {
  uint64_t place = (uint32_t)transfer;
  if (transfer <= 0 || place >= OPERATIONS) return NULL;
  struct operation *o = &v->commands.operation[place];
  return o->used && !o->forgotten && o->generation == (uint64_t)transfer >> 32 ? o : NULL;
}

/* Takes a transfer up; NULL with errno set. */
static struct operation *transfer_begin(struct vmmc_endpoint *v, uint32_t op, uint32_t import_id,
                                        const void *memory, uint64_t length, uint64_t remote_offset,
                                        uint32_t flags, uint32_t tag) {
  if (!call_begin(v)) return NULL;
  struct vmmc_command command = {.op = op,
                                 .flags = flags,
                                 .length = length,
                                 .remote_offset = remote_offset,
                                 .import_id = import_id,
                                 .tag = tag};
  int error = 0;
  struct operation *o = NULL;
  pthread_mutex_lock(&v->lock);
  if (flags & ~(uint32_t)VMMC_SEND_NOTIFY)
    error = EINVAL;
  else if (length && !heap_offset(v, memory, length, &command.offset))
    error = EFAULT;
  /* The NIC checks all of this for itself, piece by piece.  Here it is checked for all pieces at once:
   * one that is refused must not find that others have been let through. */
  else if (length > v->utlb.limit * VMMC_PAGE / 2 && import_id < VMMC_EXPORTS &&
           v->imported[import_id].used &&
           (remote_offset > v->imported[import_id].length ||
            length > v->imported[import_id].length - remote_offset))
    error = EINVAL;
  else if (!(o = operation_begin(v, &command)))
    error = EAGAIN;
  pthread_mutex_unlock(&v->lock);
  if (error) errno = error;
  return o;
}

static int transfer_finish(struct vmmc_endpoint *v, struct operation *o, uint32_t generation, int timeout_ms, bool once) {
  int error = operation_wait(v, o, generation, timeout_ms);
  pthread_mutex_lock(&v->lock);
  if (!error && operation_is_over(o, generation)) {
    error = EINVAL;
  } else if (!error) {
    error = o->error;
    operation_end(v, o);
  } else if (once) {
    operation_forget(v, o);
  }
  pthread_mutex_unlock(&v->lock);
  return error ? fail(error) : 0;
}

static int64_t transfer_post(struct vmmc_endpoint *v, struct operation *o) {
  return o ? transfer_number(v, o) : -1;
}

int vmmc_send(struct vmmc_endpoint *v, uint32_t import_id, const void *source, uint64_t length,
              uint64_t remote_offset, uint32_t flags, uint32_t tag, int timeout_ms) {
  struct operation *o = transfer_begin(v, VMMC_OP_SEND, import_id, source, length, remote_offset, flags, tag);
  return o ? transfer_finish(v, o, o->generation, timeout_ms, true) : -1;
}

int vmmc_fetch(struct vmmc_endpoint *v, uint32_t import_id, void *destination, uint64_t length,
               uint64_t remote_offset, int timeout_ms) {
  struct operation *o = transfer_begin(v, VMMC_OP_FETCH, import_id, destination, length, remote_offset, 0, 0);
  return o ? transfer_finish(v, o, o->generation, timeout_ms, true) : -1;
}

int64_t vmmc_post_send(struct vmmc_endpoint *v, uint32_t import_id, const void *source, uint64_t length,
                       uint64_t remote_offset, uint32_t flags, uint32_t tag) {
  return transfer_post(v,
                       transfer_begin(v, VMMC_OP_SEND, import_id, source, length, remote_offset, flags, tag));
}

int64_t vmmc_post_fetch(struct vmmc_endpoint *v, uint32_t import_id, void *destination, uint64_t length,
                        uint64_t remote_offset) {
  return transfer_post(v,
                       transfer_begin(v, VMMC_OP_FETCH, import_id, destination, length, remote_offset, 0, 0));
}

int vmmc_wait(struct vmmc_endpoint *v, int64_t transfer, int timeout_ms) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  struct operation *o = transfer_find(v, transfer);
  uint32_t generation = o ? o->generation : 0;
  pthread_mutex_unlock(&v->lock);
  return o ? transfer_finish(v, o, generation, timeout_ms, false) : fail(EINVAL);
}

int vmmc_forget(struct vmmc_endpoint *v, int64_t transfer) {
  if (!call_begin(v)) return -1;
  pthread_mutex_lock(&v->lock);
  struct operation *o = transfer_find(v, transfer);
  if (o) operation_forget(v, o);
  if (o) notify_changed(v);
  pthread_mutex_unlock(&v->lock);
  return o ? 0 : fail(EINVAL);
}
