// Becoming a device: a key made here, a code that is good once, and all that is pinned from then on.

import { createPrivateKey, X509Certificate } from 'node:crypto';

import { DeviceConnection, OpenConnection } from './channel.mjs';
import { malformed, refuseUnless } from './errors.mjs';
import { certificateRequest, deviceId, makeKey, readCode } from './identity.mjs';

// Redeems a code. Asked again after a lost answer it sends the same key, for which the token is still good.
export async function enrol(home, codeText) {
  const { server, token, authority } = readCode(codeText);
  const key = (await home.read('key.pem'))?.toString() ?? makeKey();
  await home.write('key.pem', key);
  const connection = new OpenConnection(server, authority);
  try {
    const answer = await connection.enrol(token, certificateRequest(key));
    if (answer.release_key.length !== 32) throw malformed('the answer to the enrolment has no release key');
    refuseUnless(isFor(answer.certificate_chain, key), 'certificate-refused', 'a certificate for another key');
    const identity = {
      certificate: answer.certificate_chain.toString(),
      population: answer.population,
      release_key: answer.release_key,
      authority: answer.server_authority.toString(),
      address: addressOf(answer.device_address, server),
    };
    await home.save('identity.json', identity);
    return { ...identity, key, id: deviceId(key) };
  } finally {
    connection.close();
  }
}

const isFor = (chain, key) => new X509Certificate(chain).checkPrivateKey(createPrivateKey(key));

// An empty host means the one that was enrolled at.
function addressOf(told, enrolledAt) {
  const [host, port] = [told.slice(0, told.lastIndexOf(':')), told.slice(told.lastIndexOf(':') + 1)];
  return `${host || enrolledAt.slice(0, enrolledAt.lastIndexOf(':'))}:${port}`;
}

export async function loadIdentity(home) {
  const identity = await home.load('identity.json');
  refuseUnless(identity, 'wrong-state', 'this device is not enrolled');
  const key = (await home.read('key.pem')).toString();
  return { ...identity, key, id: deviceId(key) };
}

// A connection for this visit; with a new certificate, if two thirds of the present one's life are over.
export async function connect(home, now) {
  const identity = await loadIdentity(home);
  const { validFrom, validTo } = new X509Certificate(identity.certificate);
  const [begin, end] = [Date.parse(validFrom), Date.parse(validTo)];
  refuseUnless(now < end, 'certificate-refused', 'the certificate has expired: enrol again, with a new code');
  const connection = new DeviceConnection(identity);
  if (now < begin + (end - begin) * 2 / 3) return { identity, connection };
  const { certificate_chain } = await connection.renew(certificateRequest(identity.key));
  connection.close();
  const renewed = { ...identity, certificate: certificate_chain.toString() };
  const { key, id, ...kept } = renewed;
  await home.save('identity.json', kept);
  return { identity: renewed, connection: new DeviceConnection(renewed) };
}
