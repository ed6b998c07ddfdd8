package caclient

// CheckJWT is what MintJWT does with an answer.
var CheckJWT = checkJWT
