// Messages: bytes to plain objects and back, by the .proto files themselves, with the limits that both sides keep.
//
// Fields have the names that the protos and the pages use. 64-bit integers become numbers where these hold them
// exactly, else BigInts, which no arithmetic takes for a number.

import path from 'node:path';

import protobuf from 'protobufjs';

import { malformed, outOfBounds, refuseUnless } from './errors.mjs';
import { keyId } from './identity.mjs';

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;
const DIGEST = /^[0-9a-f]{64}$/;
const ENTRIES = 256;

let root;

// Reads the .proto files that lie under `folder` (`folder`/umbel/v1/device.proto).
export function loadProtos(folder) {
  root = new protobuf.Root();
  root.resolvePath = (_, target) => path.join(folder, target);
  root.loadSync(['umbel/v1/device.proto', 'umbel/v1/secure_sum.proto'], { keepCase: true });
}

const typeOf = (name) => root.lookupType(`umbel.v1.${name}`);

export function decode(name, bytes) {
  const type = typeOf(name);
  try {
    const options = { defaults: true, arrays: true, objects: true, longs: String, enums: Number };
    return withIntegers(type, type.toObject(type.decode(bytes), options));
  } catch (error) {
    throw malformed(`not a ${name}: ${error.message}`);
  }
}

function withIntegers(type, value) {
  for (const field of type.fieldsArray) {
    const given = value[field.name];
    if (given === undefined || given === null || field.map) continue;
    const inner = field.resolve().resolvedType instanceof protobuf.Type && field.resolvedType;
    if (inner && field.repeated) given.forEach((item) => withIntegers(inner, item));
    else if (inner) withIntegers(inner, given);
    else if (/^u?int64$/.test(field.type)) value[field.name] = Number.isSafeInteger(+given) ? +given : BigInt(given);
  }
  return value;
}

// The one encoding that everybody comes to: fields in the order of their numbers, maps in that of their keys, and
// nothing for a field that has its default.
export function encode(name, value) {
  const type = typeOf(name);
  return Buffer.from(type.encode(type.fromObject(withoutDefaults(type, value))).finish());
}

function withoutDefaults(type, value) {
  const kept = {};
  for (const field of type.fieldsArray) {
    const given = value[field.name];
    if (given === undefined || given === null) continue;
    const inner = field.resolve().resolvedType instanceof protobuf.Type && field.resolvedType;
    if (field.map) {
      kept[field.name] = Object.fromEntries(Object.entries(given).sort(([a], [b]) => (a < b ? -1 : 1)));
    } else if (field.repeated) {
      kept[field.name] = inner ? given.map((item) => withoutDefaults(inner, item)) : given;
    } else if (inner) {
      kept[field.name] = withoutDefaults(inner, given);
    } else if (field.partOf || !isDefault(given)) {
      kept[field.name] = typeof given === 'bigint' ? String(given) : given;
    }
  }
  return kept;
}

const isDefault = (value) => Object.is(value, 0) || value === false || value.length === 0;

// The numbers of the fields that a message's bytes hold but its .proto doesn't name.
export function unknownFields(name, bytes) {
  const known = typeOf(name).fieldsById;
  const reader = protobuf.Reader.create(bytes);
  const found = [];
  while (reader.pos < reader.len) {
    const tag = reader.uint32();
    if (!known[tag >>> 3]) found.push(tag >>> 3);
    reader.skipType(tag & 7);
  }
  return found;
}

export const number = (value, what) => {
  refuseUnless(Number.isFinite(value), 'not-finite', `${what} isn't a finite number`);
  return value;
};

export function checkName(value, what) {
  if (!NAME.test(value)) throw malformed(`${what} isn't a name: ${JSON.stringify(value)}`);
}

export function checkDigest(value, what) {
  if (!DIGEST.test(value)) throw malformed(`${what} isn't a digest: ${JSON.stringify(value)}`);
}

function checkBetween(value, least, most, what) {
  if (!(value >= least && value <= most)) throw outOfBounds(`${what} is ${value}, not ${least} to ${most}`);
}

export function checkPlan(plan) {
  if (plan.kind !== 1 && plan.kind !== 2) throw malformed(`unknown kind of plan: ${plan.kind}`);
  checkBetween(plan.batch_size, 1, 2 ** 32, "the plan's batch_size");
  for (const field of ['max_steps', 'max_examples', 'min_examples', 'max_seconds', 'clip_norm']) {
    checkBetween(plan[field], 0, Number.MAX_VALUE, `the plan's ${field}`);
  }
  checkBetween(plan.max_weight, Number.MIN_VALUE, Number.MAX_VALUE, "the plan's max_weight");
  checkBetween(Object.keys(plan.hyperparameters).length, 0, ENTRIES, 'the number of hyper-parameters');
  for (const [name, value] of Object.entries(plan.hyperparameters)) {
    checkName(name, 'a hyper-parameter');
    checkBetween(value, 0, Number.MAX_VALUE, name);
  }
  return plan;
}

function checkWindow(window, what) {
  if (!window) throw malformed(`${what} is absent`);
  checkBetween(window.earliest_seconds, 0, Number.MAX_VALUE, `${what}'s begin`);
  checkBetween(window.latest_seconds, window.earliest_seconds, Number.MAX_VALUE, `${what}'s end`);
}

export function checkAssignment(assignment) {
  for (const part of ['plan', 'base', 'sealing']) if (!assignment[part]) throw malformed(`the assignment has no ${part}`);
  checkName(assignment.session_id, 'the session');
  checkName(assignment.task, 'the task');
  checkPlan(assignment.plan);
  const { public_key, key_id } = assignment.sealing;
  if (public_key.length !== 32 || key_id !== keyId(public_key)) throw malformed("a key under another key's name");
  checkBetween(assignment.upload_token.length, 1, 256, "the upload token's length");
  checkWindow(assignment.if_accepted, 'the window for accepted reports');
  checkWindow(assignment.if_rejected, 'the window for rejected reports');
  return assignment;
}

// An answer to a check-in: `assignment` or `retry` is there. Releases, offers and deltas are not for this device.
export function checkReply(reply) {
  if (reply.assignment) checkAssignment(reply.assignment);
  else if (reply.retry) checkWindow(reply.retry.window, "the retry's window");
  else throw malformed('neither work nor a window');
  return reply;
}
