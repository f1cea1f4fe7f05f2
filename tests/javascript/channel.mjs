// How a device reaches its coordinator, and its helper: gRPC over TLS, with the authority that was pinned.

import grpc from '@grpc/grpc-js';

import { fromGrpc, malformed, refuseUnless } from './errors.mjs';
import { decode, encode } from './wire.mjs';

const SECONDS = 30;
const CHUNK = 256 * 1024;
// The address is the one that was pinned: no proxy of the environment stands in between. And a name that was unreachable
// is tried again by the next visit, not by hidden retries.
const OPTIONS = { 'grpc.enable_http_proxy': 0, 'grpc.enable_retries': 0 };

const inSeconds = (seconds) => ({ deadline: Date.now() + 1000 * seconds });

class Connection {
  constructor(address, credentials) {
    this.client = new grpc.Client(address, credentials, OPTIONS);
  }

  close() {
    this.client.close();
  }

  call(method, request, value, response) {
    return new Promise((resolve, reject) => {
      this.client.makeUnaryRequest(
        `/umbel.v1.${method}`, (message) => encode(request, message), (bytes) => decode(response, bytes), value,
        inSeconds(SECONDS), (error, answer) => (error ? reject(fromGrpc(error)) : resolve(answer)),
      );
    });
  }
}

// For machines without a certificate: the coordinator's enrolment port, and a helper's.
export class OpenConnection extends Connection {
  constructor(address, authority) {
    super(address, grpc.credentials.createSsl(Buffer.from(authority)));
  }

  enrol(token, certificate_request) {
    return this.call('EnrolmentService/Enrol', 'EnrolRequest', { token, certificate_request }, 'EnrolResponse');
  }

  enrolParticipant(request) {
    const method = 'ParticipantService/EnrolParticipant';
    return this.call(method, 'EnrolParticipantRequest', request, 'EnrolParticipantResponse');
  }

  renewParticipant(request) {
    const method = 'ParticipantService/RenewParticipant';
    return this.call(method, 'RenewParticipantRequest', request, 'RenewParticipantResponse');
  }
}

// For enrolled devices: mutual TLS with the coordinator's device port.
export class DeviceConnection extends Connection {
  constructor({ address, authority, key, certificate }) {
    super(address, grpc.credentials.createSsl(Buffer.from(authority), Buffer.from(key), Buffer.from(certificate)));
  }

  renew(certificate_request) {
    return this.call('DeviceService/Renew', 'RenewRequest', { certificate_request }, 'RenewResponse');
  }

  checkIn(offered) {
    return this.call('DeviceService/CheckIn', 'CheckInRequest', offered, 'CheckInResponse');
  }

  // Gives the pieces of a blob from `offset` on to `take`, and never more than `size` bytes in all.
  async fetch(digest, offset, size, take) {
    const stream = this.client.makeServerStreamRequest(
      '/umbel.v1.DeviceService/Fetch', (message) => encode('FetchRequest', message),
      (bytes) => decode('FetchResponse', bytes), { digest, offset }, inSeconds(20 * SECONDS),
    );
    let held = offset;
    try {
      for await (const { chunk } of stream) {
        held += chunk.length;
        refuseUnless(held <= size, 'digest-mismatch', `more than the ${size} bytes that ${digest} has`);
        await take(chunk);
      }
    } catch (error) {
      stream.cancel();
      throw error.code in grpc.status ? fromGrpc(error) : error;
    }
    refuseUnless(held === size, 'digest-mismatch', `only ${held} of the ${size} bytes that ${digest} has`);
  }

  // Sends a sealed report, from where the coordinator says, and gives the window of its acknowledgement.
  report(begin, sealed) {
    const stream = this.client.makeBidiStreamRequest(
      '/umbel.v1.DeviceService/Report', (message) => encode('ReportRequest', message),
      (bytes) => decode('ReportResponse', bytes), inSeconds(20 * SECONDS),
    );
    return new Promise((resolve, reject) => {
      const fail = (error) => {
        reject(error.code in grpc.status ? fromGrpc(error) : error);
        stream.cancel();
      };
      stream.on('error', fail);
      stream.on('end', () => reject(malformed('the answer to a report ended without an acknowledgement')));
      stream.on('data', ({ proceed, accepted }) => {
        if (accepted) resolve(accepted.next);
        else if (proceed && proceed.offset <= sealed.length) sendFrom(stream, sealed, proceed.offset).catch(fail);
        else fail(malformed('neither a place to go on at nor an acknowledgement'));
      });
      stream.write({ begin });
    });
  }
}

async function sendFrom(stream, sealed, offset) {
  for (let start = offset; start < sealed.length; start += CHUNK) {
    const hasRoom = stream.write({ chunk: sealed.subarray(start, start + CHUNK) });
    if (!hasRoom) await new Promise((resolve) => { stream.once('drain', resolve); });
  }
  stream.end();
}
