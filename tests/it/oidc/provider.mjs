// An OpenID provider, of the npm package oidc-provider, for tests/it/oidc/provider.rs.
//
//   node provider.mjs FOLDER PORT ALGORITHM KEY_ID
//
// FOLDER has node_modules. The provider makes a key of its own at each start. The client `trainer`
// with the secret `secret` gets access tokens that are JWTs.
import { generateKeyPairSync } from "node:crypto";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, port, alg, kid] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${folder}/`));
const { Provider } = await import(pathToFileURL(require.resolve("oidc-provider")));

const make = {
  RS256: () => generateKeyPairSync("rsa", { modulusLength: 2048 }),
  PS256: () => generateKeyPairSync("rsa", { modulusLength: 2048 }),
  ES256: () => generateKeyPairSync("ec", { namedCurve: "P-256" }),
  EdDSA: () => generateKeyPairSync("ed25519"),
};
const signing = { ...make[alg]().privateKey.export({ format: "jwk" }), kid, alg, use: "sig" };
// ID tokens, which this test does not use, are signed with RS256 unless a client says otherwise.
const other = make.RS256().privateKey.export({ format: "jwk" });

const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [
    {
      client_id: "trainer",
      client_secret: "secret",
      grant_types: ["client_credentials"],
      redirect_uris: [],
      response_types: [],
    },
  ],
  jwks: { keys: [signing, { ...other, kid: `other-${kid}`, alg: "RS256", use: "sig" }] },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_, resource) => ({
        scope: "",
        audience: resource,
        accessTokenFormat: "jwt",
        accessTokenTTL: 600,
        jwt: { sign: { alg, kid } },
      }),
    },
  },
  enabledJWA: { userinfoSigningAlgValues: ["RS256"] },
  extraTokenClaims: () => ({ groups: ["staff", "ml-team"] }),
});
provider.listen(Number(port), "127.0.0.1", () => console.log("ready"));
